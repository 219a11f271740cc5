"""A slider for a budget in bits per weight, by keys and mouse."""

from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from mlx_optiq_ext.types.axis import LinearAxis, tick_text
from mlx_optiq_tui.quantize.budget import BudgetRange

__all__ = ["BudgetSlider"]

_EDGE = 2
"""Columns left of the track, and right of it."""
_STRIDE = 10
"""Steps of a long step."""


class BudgetSlider(Widget, can_focus=True):
    """One value between two ends: a track with a handle over a scale.

    Args:
        ends: What can be chosen.
        value: Where the handle begins.
    """

    DEFAULT_CSS = """
    BudgetSlider { height: 2; width: 1fr; color: $text-muted; }
    BudgetSlider:focus { color: $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Less", show=False),
        Binding("right", "move(1)", "More", show=False),
        Binding("pagedown,shift+left", f"move({-_STRIDE})", "Much less", show=False),
        Binding("pageup,shift+right", f"move({_STRIDE})", "Much more", show=False),
        Binding("home", "end('low')", "Least", show=False),
        Binding("end", "end('high')", "Most", show=False),
    ]
    ends: reactive[BudgetRange] = reactive(BudgetRange(low=2.5, high=8.5), always_update=True)
    value: reactive[float] = reactive(5.0)

    class Changed(Message):
        """The handle was moved by the user."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    def render(self) -> Text:
        """The track above, the scale below."""
        width = max(self.size.width - 2 * _EDGE, 10)
        axis = LinearAxis(low=self.ends.low, high=max(self.ends.high, self.ends.low + self.ends.step))
        handle = round(axis.fraction(self.value) * (width - 1))
        track = "━" * handle + "●" + "─" * (width - 1 - handle)
        scale = [" "] * (width + 2 * _EDGE)
        for tick in axis.ticks(max(width // 8, 2)):
            text = tick_text(tick)
            start = max(_EDGE + round(axis.fraction(tick) * (width - 1)) - len(text) // 2, 0)
            scale[start : start + len(text)] = text
        return Text(f"{' ' * _EDGE}{track}\n{''.join(scale)}", no_wrap=True)

    def move_to(self, value: float) -> None:
        """Move the handle and tell."""
        wanted = self.ends.clip(value)
        if wanted != self.value:
            self.value = wanted
            self.post_message(self.Changed(wanted))

    def action_move(self, steps: int) -> None:
        """Move by steps."""
        self.move_to(self.value + steps * self.ends.step)

    def action_end(self, name: str) -> None:
        """Move to an end."""
        self.move_to(self.ends.low if name == "low" else self.ends.high)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Begin to drag."""
        event.stop()
        self.focus()
        self.capture_mouse()
        self._to_column(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drag."""
        if self.app.mouse_captured is self:
            self._to_column(event.x)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """Let go."""
        event.stop()
        self.release_mouse()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """One step more."""
        event.stop()
        self.action_move(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """One step less."""
        event.stop()
        self.action_move(-1)

    def _to_column(self, column: int) -> None:
        width = max(self.size.width - 2 * _EDGE, 10)
        share = min(max((column - _EDGE) / (width - 1), 0.0), 1.0)
        self.move_to(self.ends.low + share * (self.ends.high - self.ends.low))
