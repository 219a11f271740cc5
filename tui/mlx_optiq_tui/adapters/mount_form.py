"""Ask what to mount, and under which name."""

from collections.abc import Sequence
from typing import ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Button, Input, Label, Select

__all__ = ["MountForm", "Mounting"]


class Mounting(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    name: str
    source: str
    model: str


class MountForm(ModalScreen[Mounting | None]):
    """A form; its result is None where it is left.

    Args:
        available: Folders that the server offers.
        models: Models that can take an adapter, the default one first.
        source: What to begin with.
    """

    DEFAULT_CSS = """
    MountForm { align: center middle; }
    MountForm > Vertical { width: 70; max-width: 100%; height: auto; background: $surface;
                           border: round $primary; padding: 0 2; }
    MountForm Input, MountForm Select { margin-bottom: 1; }
    MountForm Horizontal { height: auto; align-horizontal: right; }
    MountForm Button { margin-left: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(self, available: Sequence[str], models: Sequence[str], source: str = "") -> None:
        super().__init__()
        self._available, self._models, self._source = available, models, source

    def compose(self) -> ComposeResult:
        """Source, name and, where there are several, model."""
        with Vertical():
            yield Label("Folder below the server's --adapters-dir, or a Hub id")
            yield Input(
                self._source, suggester=SuggestFromList(self._available), id="source", placeholder="org/name"
            )
            yield Label("Name in requests")
            yield Input(id="name", placeholder=_name_of(self._source))
            if len(self._models) > 1:
                yield Label("Model")
                yield Select([(model, model) for model in self._models], value=self._models[0], id="model")
            with Horizontal():
                yield Button("Cancel", id="cancel")
                yield Button("Mount", id="mount", variant="primary")

    def on_input_changed(self, event: Input.Changed) -> None:
        """Offer a name."""
        if event.input.id == "source":
            self.query_one("#name", Input).placeholder = _name_of(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go on to the name, then mount."""
        if event.input.id == "source":
            self.query_one("#name").focus()
        else:
            self._mount_it()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Mount, or leave."""
        if event.button.id == "mount":
            self._mount_it()
        else:
            self.dismiss(None)

    def _mount_it(self) -> None:
        source = self.query_one("#source", Input).value.strip()
        name = self.query_one("#name", Input).value.strip() or _name_of(source)
        chosen = self.query_one("#model", Select).value if len(self._models) > 1 else ""
        if source:
            self.dismiss(Mounting(name=name, source=source, model=str(chosen)))
        else:
            self.query_one("#source").focus()


def _name_of(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2]
