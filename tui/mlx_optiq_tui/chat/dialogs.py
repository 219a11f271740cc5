"""Small dialogs of the chat: one line of text, and the list of conversations."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import msgspec
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input as Field
from textual.widgets import Label, OptionList, Static
from textual.widgets.option_list import Option

from mlx_optiq_tui.chat.plain import plain
from mlx_optiq_tui.chat.store import ConversationEntry

__all__ = ["Chosen", "ConversationList", "LineForm"]


class LineForm(ModalScreen[str | None]):
    """Ask for one line; its result is None where it is left.

    Args:
        question: What to write.
        text: What to begin with.
        hint: Said below.
    """

    DEFAULT_CSS = """
    LineForm { align: center middle; }
    LineForm > Vertical { width: 70; max-width: 100%; height: auto; background: $surface;
                          border: round $primary; padding: 0 2; }
    LineForm Static { color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(self, question: str, text: str = "", hint: str = "") -> None:
        super().__init__()
        self._question, self._text, self._hint = question, text, hint

    def compose(self) -> ComposeResult:
        """Question, field, hint."""
        with Vertical():
            yield Label(self._question, markup=False)
            yield Field(self._text)
            yield Static(self._hint, markup=False)

    def on_input_submitted(self, event: Field.Submitted) -> None:
        """Take it."""
        self.dismiss(event.value.strip())


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of a conversation."""

    id: str
    deed: Literal["open", "rename", "delete", "export"]


class ConversationList(ModalScreen[Chosen | None]):
    """The conversations, newest first, or those with some words; its result is None where it is left.

    Args:
        find: Lists those that have all words of a text; blocks on the disk.
    """

    DEFAULT_CSS = """
    ConversationList { align: center middle; }
    ConversationList > Vertical { width: 76; max-width: 100%; height: auto; max-height: 90%;
                                  background: $surface; border: round $primary; padding: 0 1; }
    ConversationList OptionList, ConversationList OptionList:focus {
        height: auto; max-height: 16; border: none !important; padding: 0; background: $surface; }
    ConversationList Static { color: $text-muted; }
    """
    AUTO_FOCUS = "OptionList"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "close", "Close"),
        ("slash", "search", "Search"),
        ("r", "choose('rename')", "Rename"),
        ("d,delete", "choose('delete')", "Delete"),
        ("e", "choose('export')", "Export as Markdown"),
    ]

    def __init__(self, find: Callable[[str], Sequence[ConversationEntry]]) -> None:
        super().__init__()
        self._find = find
        self._entries: Sequence[ConversationEntry] = ()

    def compose(self) -> ComposeResult:
        """Search and list over the keys."""
        with Vertical():
            yield Label("Conversations", id="heading", markup=False)
            yield Field(placeholder="/ searches in names and texts", compact=True)
            yield OptionList()
            yield Static("Enter open · / search · r rename · e export · d delete · Esc close", markup=False)

    def on_mount(self) -> None:
        """List all."""
        self._list("")

    def on_input_changed(self, event: Field.Changed) -> None:
        """List what has these words."""
        self._list(event.value)

    def on_input_submitted(self) -> None:
        """Go on in what was found."""
        self.query_one(OptionList).focus()

    @work(exclusive=True, group="list")
    async def _list(self, words: str) -> None:
        self._entries = await asyncio.to_thread(self._find, words)
        none = f"Nothing has the words {words!r}." if words else "No conversation was kept yet."
        self.query_one("#heading", Label).update("Conversations" if self._entries else none)
        listed = self.query_one(OptionList)
        listed.set_options([Option(_line(entry), id=entry.id) for entry in self._entries])
        listed.highlighted = 0 if self._entries else None

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open it."""
        self.dismiss(Chosen(id=str(event.option.id), deed="open"))

    def action_search(self) -> None:
        """Write what to search for."""
        self.query_one(Field).focus()

    def action_close(self) -> None:
        """Leave the search, then the list."""
        field = self.query_one(Field)
        if field.value:
            field.value = ""
        if field.has_focus:
            self.query_one(OptionList).focus()
        else:
            self.dismiss(None)

    def action_choose(self, deed: Literal["rename", "delete", "export"]) -> None:
        """Do something with the highlighted one."""
        index = self.query_one(OptionList).highlighted
        if index is not None:
            self.dismiss(Chosen(id=self._entries[index].id, deed=deed))


def _line(entry: ConversationEntry) -> Text:
    text = Text(time.strftime("%Y-%m-%d %H:%M  ", time.localtime(entry.changed)), "dim", no_wrap=True)
    text.append("draft  " if entry.has_draft else "", "italic")
    text.append(plain(entry.name))
    text.append(f"  {plain(entry.problem)}" if entry.problem else f"  {entry.turns} asked", "dim")
    return text
