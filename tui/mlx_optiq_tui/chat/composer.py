"""Where messages are written: text, pictures, and how the answer will be asked for.

Posts what was entered; knows no conversation and no server. Enter sends, Ctrl+J begins a line.
"""

from collections.abc import Sequence
from pathlib import Path

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Static, TextArea

from mlx_optiq_tui.chat.image_view import ImageView
from mlx_optiq_tui.chat.pictures import pasted_path

__all__ = ["Composer", "Prompt"]

_NEW_LINE = ("ctrl+j", "shift+enter", "alt+enter")


class Prompt(TextArea):
    """The text field."""

    class Submitted(Message):
        """Enter was pressed."""

    class Pasted(Message):
        """The path of a picture was pasted or dropped."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    class Erased(Message):
        """Backspace was pressed where nothing is left to erase."""

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            self._take(event)
            self.post_message(self.Submitted())
        elif event.key in _NEW_LINE:
            self._take(event)
            self.insert("\n")
        elif event.key == "backspace" and not self.text:
            self._take(event)
            self.post_message(self.Erased())
        else:
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        path = pasted_path(event.text)
        if path is None:
            await super()._on_paste(event)
        else:
            event.stop()
            event.prevent_default()
            self.post_message(self.Pasted(path))

    def _take(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()


class Composer(Vertical):
    """The text field under the pictures that go along, and a line about the next answer."""

    DEFAULT_CSS = """
    Composer { height: auto; border-top: solid $panel; }
    Composer #pictures { height: auto; display: none; padding: 0 1; }
    Composer #pictures.-some { display: block; layout: horizontal; }
    Composer #pictures ImageView { margin-right: 2; }
    Composer Prompt { height: auto; min-height: 2; max-height: 8; border: none; padding: 0 1;
                      background: $background; }
    Composer Prompt:focus { border: none; background: $surface; }
    Composer #next { height: 1; padding: 0 1; color: $text-muted; text-overflow: ellipsis;
                     text-wrap: nowrap; }
    Composer #next.-warning { color: $warning; text-style: bold; }
    """

    def compose(self) -> ComposeResult:
        """Pictures, text, line."""
        yield Horizontal(id="pictures")
        yield Prompt(id="prompt", placeholder="Write a message; Enter sends, Ctrl+J begins a new line")
        yield Static(id="next", markup=False)

    @property
    def prompt(self) -> Prompt:
        """The text field."""
        return self.query_one(Prompt)

    @property
    def text(self) -> str:
        """What is written."""
        return self.prompt.text

    @text.setter
    def text(self, text: str) -> None:
        self.prompt.text = text
        self.prompt.move_cursor(self.prompt.document.end)

    def say(self, words: str, *, warning: bool = False) -> None:
        """Tell about the next answer."""
        line = self.query_one("#next", Static)
        line.update(words)
        line.set_class(warning, "-warning")

    async def show_pictures(self, pictures: Sequence[tuple[Path, str]]) -> None:
        """Show these, by path and label."""
        row = self.query_one("#pictures", Horizontal)
        row.set_class(bool(pictures), "-some")
        await row.remove_children()
        await row.mount_all(ImageView(path, label) for path, label in pictures)
