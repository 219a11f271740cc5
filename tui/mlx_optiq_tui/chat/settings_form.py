"""How the next answers are asked for: model, adapter, sampling, thinking, system message, tools."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Grid, Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Select, Static, TextArea

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.chat.conversation import EFFORTS, ChatSettings, Effort
from mlx_optiq_tui.chat.tools import TOOLS
from mlx_optiq_tui.widgets.tick import Tick

__all__ = ["SettingsForm", "parse_number", "settings_words"]

_NUMBERS: Mapping[str, tuple[str, type[int] | type[float], float, float]] = {
    "temperature": ("temperature", float, 0.0, 2.0),
    "top_p": ("top-p", float, 0.0, 1.0),
    "max_tokens": ("max tokens", int, 1, 10_000_000),
    "seed": ("seed", int, -(2**63), 2**63 - 1),
}
"""Label, kind and bounds of the fields that take a number; nothing written leaves it to the server."""


class SettingsForm(ModalScreen[ChatSettings | None]):
    """A form; its result is None where it is left.

    Args:
        settings: What holds now.
        status: Models and adapters to choose from; None while no server is reached.
    """

    DEFAULT_CSS = """
    SettingsForm { align: center middle; }
    SettingsForm > Vertical { width: 78; max-width: 100%; height: auto; max-height: 100%;
                              background: $surface; border: round $primary; padding: 0 1; }
    SettingsForm Grid { grid-size: 4; grid-columns: 11 1fr 11 1fr; grid-rows: 1; grid-gutter: 0 1;
                        height: 4; margin-bottom: 1; }
    SettingsForm Label { color: $text-muted; }
    SettingsForm TextArea { height: 4; border: none; background: $panel; padding: 0 1; }
    SettingsForm .row { height: 1; margin-top: 1; }
    SettingsForm Checkbox { margin-right: 2; }
    SettingsForm #wrong { color: $error; height: auto; }
    SettingsForm Button { margin-right: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "dismiss(None)", "Cancel"),
        ("ctrl+s", "done", "Use"),
    ]

    def __init__(self, settings: ChatSettings, status: EngineStatus | None) -> None:
        super().__init__()
        self._settings = settings
        self._models = [model.id for model in status.models] if status else []
        self._adapters = ["base", *(each.name for each in status.adapters)] if status else []

    def compose(self) -> ComposeResult:
        """Fields over buttons."""
        settings = self._settings
        with Vertical():
            with Grid():
                yield from _choice("model", self._models, settings.model, "the server's")
                yield from _choice("adapter", self._adapters, settings.adapter, "the server's")
                for name, (label, *_) in _NUMBERS.items():
                    value = getattr(settings, name)
                    yield Label(label)
                    yield Input(
                        "" if value is None else str(value), id=name, placeholder="the server's", compact=True
                    )
                yield from _choice("effort", EFFORTS[1:], settings.effort, "the model's", label="thinking")
            yield Label("System message")
            yield TextArea(settings.system, id="system")
            with Horizontal(classes="row"):
                yield Label("Tools  ")
                for tool in TOOLS.values():
                    yield Tick(tool.title, tool.name in settings.tools, id=f"tool-{tool.name}", compact=True)
            yield Static(id="wrong", markup=False)
            with Horizontal(classes="row"):
                yield Button("Use (Ctrl+S)", id="done", variant="primary", compact=True)
                yield Button("Cancel (Esc)", id="cancel", compact=True)

    def on_input_submitted(self) -> None:
        """Enter in a field is enough."""
        self.action_done()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Use, or leave."""
        if event.button.id == "done":
            self.action_done()
        else:
            self.dismiss(None)

    def action_done(self) -> None:
        """Take what is written, or say what is wrong with it."""
        try:
            numbers = {name: parse_number(name, self.query_one(f"#{name}", Input).value) for name in _NUMBERS}
        except UsageError as error:
            self.query_one("#wrong", Static).update(str(error))
            return
        self.dismiss(
            ChatSettings(
                model=str(self.query_one("#model", Select).value),
                adapter=str(self.query_one("#adapter", Select).value),
                effort=msgspec.convert(self.query_one("#effort", Select).value, Effort),
                system=self.query_one("#system", TextArea).text.strip(),
                tools=tuple(name for name in TOOLS if self.query_one(f"#tool-{name}", Tick).value),
                **numbers,  # type: ignore[arg-type]
            )
        )


def parse_number(name: str, text: str) -> int | float | None:
    """The number in a field; None where it is empty.

    Raises:
        UsageError: No number, or out of bounds.
    """
    label, kind, least, most = _NUMBERS[name]
    if not text.strip():
        return None
    try:
        value: int | float | None = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        wanted = "a whole number" if kind is int else "a number"
        bounds = f" from {least:g} to {most:g}" if kind is float else (" from 1" if least == 1 else "")
        raise UsageError(f"{label} takes {wanted}{bounds}, not {text!r}")
    return value


def settings_words(settings: ChatSettings) -> str:
    """What is not left to the server, on one line."""
    parts = [
        f"{label} {value}"
        for name, (label, *_) in _NUMBERS.items()
        if (value := getattr(settings, name)) is not None
    ]
    if settings.effort:
        parts.append(f"thinking {settings.effort}")
    if settings.system:
        parts.append("system message")
    parts += [TOOLS[name].title for name in settings.tools if name in TOOLS]
    return " · ".join(parts)


def _choice(name: str, known: Sequence[str], value: str, unsaid: str, label: str = "") -> ComposeResult:
    """A label and a list; what holds now can be kept although the server does not know it."""
    names = [*known, *([value] if value and value not in known else [])]
    yield Label(label or name)
    yield Select(
        [(unsaid, ""), *((each, each) for each in names)],
        value=value,
        allow_blank=False,
        id=name,
        compact=True,
    )
