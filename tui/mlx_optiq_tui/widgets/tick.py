"""A check box that is seen to be ticked without colour."""

from textual.widgets import Checkbox

__all__ = ["Tick"]


class Tick(Checkbox):
    """Shows ✓ or nothing: Textual's own shows the same sign in another colour."""

    def on_mount(self) -> None:
        """Draw the first tick."""
        self._tick()

    def watch_value(self) -> None:
        """Draw the tick."""
        self._tick()
        super().watch_value()

    def _tick(self) -> None:
        self.BUTTON_INNER = "✓" if self.value else " "
        self.refresh()
