"""A form made from an options Struct: one field per option, with its bounds, its default and its description.

Knows any Struct that ``formats.arguments`` makes flags of. The answer is the flags of what was changed.
"""

from collections.abc import Sequence
from typing import Any, get_args, get_origin

import msgspec
from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widget import Widget
from textual.widgets import Input, Label, Select, Static

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import Option, check_value, flag_name, options_of
from mlx_optiq_tui.widgets.tick import Tick

__all__ = ["OptionForm"]

_UNSAID = "unsaid"
"""Choice of a list where the command decides."""


class OptionForm(VerticalScroll):
    """Fields for options; what one is for is said below while it has the focus.

    Args:
        groups: Struct types and the fields wanted of each, in this order; no fields: all.
    """

    DEFAULT_CSS = """
    OptionForm { height: auto; }
    OptionForm Horizontal { height: 1; width: 1fr; }
    OptionForm Label { width: 20; color: $text-muted; }
    OptionForm Input, OptionForm Select { width: 1fr; max-width: 28; }
    OptionForm Tick { width: 8; }
    OptionForm #about { height: 3; color: $text-muted; }
    OptionForm #about.-wrong { color: $error; }
    OptionForm #fields { height: auto; layout: grid; grid-size: 2; grid-gutter: 0 2; grid-rows: 1; }
    """

    def __init__(self, *groups: tuple[type[msgspec.Struct], Sequence[str]], id: str | None = None) -> None:
        super().__init__(id=id)
        self.options: dict[str, Option] = {}
        for kind, names in groups:
            known = {option.name: option for option in options_of(kind)}
            self.options |= {name: known[name] for name in names or known}

    def compose(self) -> ComposeResult:
        """Two columns of fields over the words."""
        with Widget(id="fields"):
            for option in self.options.values():
                with Horizontal():
                    yield Label(option.name.replace("_", " "))
                    yield _field(option)
        yield Static(id="about", markup=False)

    def flags(self) -> tuple[str, ...]:
        """Command-line words of every option that differs from its default.

        Raises:
            UsageError: A value is out of bounds; the message names the flag.
        """
        words: list[str] = []
        for option in self.options.values():
            words += _words(option, self._value(option))
        return tuple(words)

    def fill(self, name: str, value: object) -> None:
        """Put a value into a field."""
        field = self.query_one(f"#option-{name}")
        if isinstance(field, Tick):
            field.value = bool(value)
        elif isinstance(field, Select):
            field.value = value
        elif isinstance(field, Input):
            field.value = str(value)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Say what the field is for."""
        self._say((event.widget.id or "").removeprefix("option-"))

    def on_input_changed(self, event: Input.Changed) -> None:
        """Say at once what is wrong with a value."""
        event.stop()
        self._say((event.input.id or "").removeprefix("option-"), only_wrong=not event.input.has_focus)

    def _say(self, name: str, *, only_wrong: bool = False) -> None:
        option = self.options.get(name)
        if option is None:
            return
        about = self.query_one("#about", Static)
        try:
            _words(option, self._value(option))
        except UsageError as error:
            about.update(str(error))
            about.add_class("-wrong")
        else:
            if not only_wrong:
                about.update(f"{option.description} It takes {option.wanted}.")
                about.remove_class("-wrong")

    def _value(self, option: Option) -> Any:
        field = self.query_one(f"#option-{option.name}")
        if isinstance(field, Tick):
            return field.value
        if isinstance(field, Select):
            return option.default if field.value == _UNSAID else field.value
        assert isinstance(field, Input)
        text = field.value.strip()
        if not text:
            return option.default
        return tuple(text.split()) if get_origin(option.kind) is tuple else text


def _field(option: Option) -> Widget:
    """The field of one option, filled with its default."""
    id = f"option-{option.name}"
    if option.kind is bool:
        return Tick(value=bool(option.default), id=id, compact=True)
    if get_origin(option.kind) is not None and get_origin(option.kind) is not tuple:
        choices = [(str(choice), choice) for choice in get_args(option.kind)]
        if option.default is None:
            choices.insert(0, ("as the command decides", _UNSAID))
        value = _UNSAID if option.default is None else option.default
        return Select(choices, value=value, allow_blank=False, id=id, compact=True)
    default = option.default
    shown = "" if default in (None, ()) else f"{default:g}" if isinstance(default, float) else str(default)
    return Input(shown, placeholder=option.wanted, id=id, compact=True)


def _words(option: Option, value: Any) -> list[str]:
    """Flag and value; nothing where the value is the default."""
    checked = check_value(option, value)
    if checked == option.default:
        return []
    flag = flag_name(option.name)
    if isinstance(checked, bool):
        return [flag if checked else flag.replace("--", "--no-", 1)]
    if isinstance(checked, tuple):
        return [word for item in checked for word in (flag, str(item))]
    return [flag, f"{checked:g}" if isinstance(checked, float) else str(checked)]
