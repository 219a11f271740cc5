"""Plan a training: base, data, output, options; then what it would do, as a dry run tells it.

The fields are made from the options' own declarations. Tells the screen by messages what is to be started.
"""

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Button, Input, Label, Static

from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.training import TrainOptions
from mlx_optiq_tui.finetune.plan import Planned, plan_text, samples_text
from mlx_optiq_tui.widgets.option_form import OptionForm

__all__ = ["TrainPane"]

_TRAINING = (
    *("method", "train_on", "epochs", "steps", "batch_size", "accumulate", "learning_rate", "max_length"),
    *("validation_share", "validate_every", "report_every", "patience", "dropout", "grad_checkpoint"),
    *("beta", "dpo_loss", "seed", "save_every"),
)
_ADAPTER = ("rank", "rank_scaling", "max_parameters", "targets", "num_blocks", "scale")


class TrainPane(VerticalScroll):
    """Fields over the plan."""

    DEFAULT_CSS = """
    TrainPane { padding: 0 1; }
    TrainPane > Horizontal { height: 1; }
    TrainPane > Horizontal > Label { width: 20; color: $text-muted; }
    TrainPane > Horizontal > Input { width: 1fr; }
    TrainPane #train-buttons { margin: 0 0 1 0; }
    TrainPane Button { margin-right: 2; }
    TrainPane #plan, TrainPane #samples { height: auto; }
    """

    class Asked(Message):
        """A button was pressed: ``check`` or ``train``."""

        def __init__(self, step: str) -> None:
            super().__init__()
            self.step = step

    def __init__(self) -> None:
        super().__init__()
        self.planned: Planned | None = None

    def compose(self) -> ComposeResult:
        """What, on what, where to, how; then the plan."""
        for name, label, hint in (
            ("base", "Base model", "folder or Hub id, quantized or not"),
            ("data", "Data", "folder, JSONL file or Hub id"),
            ("adapter", "Adapter", "folder to make"),
        ):
            with Horizontal():
                yield Label(label)
                yield Input(id=name, placeholder=hint, compact=True)
        with Horizontal(id="train-buttons"):
            yield Button("Check (k)", id="check", compact=True)
            yield Button("Train (s)", id="train", variant="primary", compact=True)
        yield Static(id="plan", markup=False)
        yield OptionForm((AdapterOptions, _ADAPTER), (TrainOptions, _TRAINING))
        yield Static(id="samples", markup=False)

    def field(self, name: str) -> str:
        """``base``, ``data`` or ``adapter``, as it was typed."""
        return self.query_one(f"#{name}", Input).value.strip()

    def fill(self, name: str, value: str, *, replace: bool = True) -> None:
        """Put a value into ``base``, ``data`` or ``adapter``.

        Args:
            name: Of the field.
            value: What to put there.
            replace: Also where something stands there.
        """
        field = self.query_one(f"#{name}", Input)
        if replace or not field.value:
            field.value = value

    @property
    def flags(self) -> tuple[str, ...]:
        """Options as command-line words.

        Raises:
            UsageError: One is out of bounds.
        """
        return self.query_one(OptionForm).flags()

    def show(self, planned: Planned) -> None:
        """Draw the plan, and the first examples as the model reads them."""
        self.planned = planned
        self._draw()

    @on(Input.Changed, "#base, #data")
    def _changed(self) -> None:
        """What was planned was of another base, or of other data."""
        self.planned = None
        self._draw()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self.call_after_refresh(self._draw)

    def _draw(self) -> None:
        if self.planned is None:
            self.query_one("#plan", Static).update("")
            self.query_one("#samples", Static).update("")
        else:
            width = max(self.content_size.width - 2, 40)
            self.query_one("#plan", Static).update(plan_text(self.planned, width))
            self.query_one("#samples", Static).update(samples_text(self.planned.preview.samples))

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Asked(event.button.id or ""))
