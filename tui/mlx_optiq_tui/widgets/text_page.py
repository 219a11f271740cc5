"""A page of text over a screen, to be read and closed."""

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

__all__ = ["TextPage"]


class TextPage(ModalScreen[None]):
    """Text under a title; Escape closes it.

    Args:
        title: Above it.
        text: The page.
    """

    DEFAULT_CSS = """
    TextPage { align: center middle; }
    TextPage VerticalScroll { width: 90%; height: auto; max-height: 90%; background: $surface;
                              border: round $primary; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,enter", "dismiss(None)", "Close")]

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """The text, scrolled by keys."""
        with VerticalScroll() as page:
            page.border_title = self._title
            page.border_subtitle = "Esc closes"
            yield Static(self._text, markup=False)

    def on_mount(self) -> None:
        """Keys scroll at once."""
        self.query_one(VerticalScroll).focus()
