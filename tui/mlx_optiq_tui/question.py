"""Ask before something that cannot be taken back."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

__all__ = ["Question"]


class Question(ModalScreen[bool]):
    """A question with two answers; the screen's result is whether it was agreed to.

    Args:
        text: The question.
        yes: What agreeing does, as a button says it.
        no: The other button; it has the focus.
    """

    DEFAULT_CSS = """
    Question { align: center middle; }
    Question Vertical { width: 76; max-width: 100%; height: auto; background: $surface;
                        border: round $warning; padding: 1 2; }
    Question VerticalScroll { height: auto; max-height: 14; }
    Question Horizontal { height: auto; margin-top: 1; align-horizontal: right; }
    Question Button { margin-left: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,n", "answer(False)", "No"),
        ("y", "answer(True)", "Yes"),
    ]

    def __init__(self, text: str, *, yes: str, no: str = "Cancel") -> None:
        super().__init__()
        self._text, self._yes, self._no = text, yes, no

    def compose(self) -> ComposeResult:
        """The question over its answers."""
        with Vertical():
            with VerticalScroll():
                yield Static(self._text, markup=False)
            with Horizontal():
                yield Button(f"{self._no} (n)", id="no")
                yield Button(f"{self._yes} (y)", id="yes", variant="warning")

    def on_mount(self) -> None:
        """Nothing happens by a hasty Enter."""
        self.query_one("#no", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, agreed: bool) -> None:
        """Answer by key."""
        self.dismiss(agreed)
