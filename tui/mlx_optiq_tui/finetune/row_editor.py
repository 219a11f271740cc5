"""Edit one row of a data set: a text field for each of its parts, and at once what is wrong with it."""

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static, TextArea

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_tui.finetune.rows import Method, Row, example_of, fields_of, form_of, row_of_fields

__all__ = ["RowEditor"]


class RowEditor(ModalScreen[Row | None]):
    """The screen's result is the row as it was edited, None where the editor was left.

    Args:
        row: To begin with.
        method: By whose rules it is checked.
    """

    DEFAULT_CSS = """
    RowEditor { align: center middle; }
    RowEditor > Vertical { width: 90%; height: 90%; background: $surface; border: round $primary;
                           padding: 0 1; }
    RowEditor TextArea { height: 1fr; min-height: 3; }
    RowEditor Label { color: $text-muted; }
    RowEditor #wrong { height: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s,f10", "keep", "Keep", priority=True),
        Binding("escape", "dismiss(None)", "Cancel", priority=True),
    ]

    def __init__(self, row: Row, method: Method) -> None:
        super().__init__()
        self._row, self._method, self._form = row, method, form_of(row)

    def compose(self) -> ComposeResult:
        """One field below the other."""
        with Vertical():
            for name, text in fields_of(self._row).items():
                hint = (
                    ": ## user, ## assistant and so on, and below each what it says"
                    if name == "messages"
                    else ""
                )
                yield Label(f"{name}{hint}", markup=False)
                yield TextArea(text, id=f"field-{name}", soft_wrap=True, tab_behavior="focus")
            yield Static(id="wrong", markup=False)

    def on_mount(self) -> None:
        """Begin in the first field."""
        self.query(TextArea).first().focus()
        self._check()

    @on(TextArea.Changed)
    def _check(self) -> None:
        problem = ""
        try:
            found = example_of(self._edited(), self._method, "")
            problem = found if isinstance(found, str) else ""
        except UsageError as error:
            problem = str(error)
        keys = "Ctrl+S or F10 keeps it, Escape gives up what was changed"
        self.query_one("#wrong", Static).update(f"✕ {problem}\n{keys}" if problem else f"✓ usable\n{keys}")

    def action_keep(self) -> None:
        """Take what was written, usable or not; only text that makes no row is refused."""
        try:
            self.dismiss(self._edited())
        except UsageError as error:
            self.notify(str(error), severity="warning")

    def _edited(self) -> Row:
        fields = {(area.id or "").removeprefix("field-"): area.text for area in self.query(TextArea)}
        return row_of_fields(self._form, fields)
