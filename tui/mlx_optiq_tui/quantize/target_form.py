"""Ask for a budget as a size: of the checkpoint, or of the memory for the model and its KV cache."""

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static

from mlx_optiq_ext.errors import OptiqError

__all__ = ["TargetForm"]


class TargetForm(ModalScreen[float | None]):
    """A form; its result is a budget in stored bits per weight, None where it is left.

    Args:
        budget_of: Size, memory → bits per weight; raises OptiqError in words where there is none.
        context: Tokens that the memory is to hold, for the label.
    """

    DEFAULT_CSS = """
    TargetForm { align: center middle; }
    TargetForm > Vertical { width: 70; max-width: 100%; height: auto; background: $surface;
                            border: round $primary; padding: 0 2; }
    TargetForm Input { margin-bottom: 1; }
    TargetForm #wrong { height: auto; color: $error; }
    TargetForm Horizontal { height: auto; align-horizontal: right; }
    TargetForm Button { margin-left: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(self, budget_of: Callable[[str, str], float], context: int) -> None:
        super().__init__()
        self._budget_of, self._num_tokens = budget_of, context

    def compose(self) -> ComposeResult:
        """One field for each way, one of them to be filled."""
        with Vertical():
            yield Label("Size of the checkpoint at most")
            yield Input(id="size", placeholder="4.5GB, 900MB")
            yield Label(f"or memory for weights, {self._num_tokens:,} tokens of KV cache and head room")
            yield Input(id="memory", placeholder="8GB")
            yield Static(id="wrong", markup=False)
            with Horizontal():
                yield Button("Cancel", id="cancel")
                yield Button("Use", id="use", variant="primary")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Use it, or go on to the next field."""
        event.stop()
        if event.input.id == "size" and not event.value.strip():
            self.query_one("#memory").focus()
        else:
            self._use()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Use it, or leave."""
        event.stop()
        if event.button.id == "use":
            self._use()
        else:
            self.dismiss(None)

    def _use(self) -> None:
        size, memory = (self.query_one(name, Input).value.strip() for name in ("#size", "#memory"))
        if bool(size) == bool(memory):
            self.query_one("#wrong", Static).update("Fill one of the two.")
            return
        try:
            self.dismiss(self._budget_of(size, memory))
        except OptiqError as error:
            self.query_one("#wrong", Static).update(str(error))
