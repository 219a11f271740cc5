"""Small dialogs of the chat: one line of text, and the list of conversations."""

import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import msgspec
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input as Field
from textual.widgets import Label, OptionList, Static
from textual.widgets.option_list import Option

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
    """The conversations, newest first; its result is None where it is left.

    Args:
        entries: What to list.
    """

    DEFAULT_CSS = """
    ConversationList { align: center middle; }
    ConversationList > Vertical { width: 76; max-width: 100%; height: auto; max-height: 90%;
                                  background: $surface; border: round $primary; padding: 0 1; }
    ConversationList OptionList, ConversationList OptionList:focus {
        height: auto; max-height: 16; border: none !important; padding: 0; background: $surface; }
    ConversationList Static { color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "dismiss(None)", "Close"),
        ("r", "choose('rename')", "Rename"),
        ("d,delete", "choose('delete')", "Delete"),
        ("e", "choose('export')", "Export as Markdown"),
    ]

    def __init__(self, entries: Sequence[ConversationEntry]) -> None:
        super().__init__()
        self._entries = entries

    def compose(self) -> ComposeResult:
        """The list over its keys."""
        with Vertical():
            yield Label("Conversations" if self._entries else "No conversation was kept yet.")
            yield OptionList(*(Option(_line(entry), id=entry.id) for entry in self._entries))
            yield Static("Enter open · r rename · e export as Markdown · d delete · Esc close", markup=False)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Open it."""
        self.dismiss(Chosen(id=str(event.option.id), deed="open"))

    def action_choose(self, deed: Literal["rename", "delete", "export"]) -> None:
        """Do something with the highlighted one."""
        index = self.query_one(OptionList).highlighted
        if index is not None:
            self.dismiss(Chosen(id=self._entries[index].id, deed=deed))


def _line(entry: ConversationEntry) -> Text:
    text = Text(time.strftime("%Y-%m-%d %H:%M  ", time.localtime(entry.changed)), "dim", no_wrap=True)
    text.append(entry.name)
    text.append(f"  {entry.problem}" if entry.problem else f"  {entry.turns} asked", "dim")
    return text
