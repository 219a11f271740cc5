"""Text of any length that grows, shown as it is: what costs as little at ten thousand lines as at ten.

One widget for each hundred lines, so that a piece that comes lays out only the last of them. Used by
``transcript`` for what is too long for Markdown, for thoughts and for questions.
"""

import time

from textual.containers import Vertical
from textual.widgets import Static

from mlx_optiq_tui.chat.plain import plain

__all__ = ["LongText", "split_after"]

_LINES, _CHARACTERS = 100, 8000
"""Of each widget."""
_DRAW_S, _LONGEST_S = 0.1, 2.0
"""Pieces that come within this are drawn together; longer where drawing takes long, which keys wait for."""
_REST = 4
"""Of the time, drawing may take one part in so many and one."""


class LongText(Vertical):
    """Shows what it was given and what is added.

    Args:
        text: What is there already.
        classes: CSS classes.
    """

    DEFAULT_CSS = """
    LongText { height: auto; width: 1fr; }
    LongText Static { height: auto; }
    """

    def __init__(self, text: str = "", classes: str = "") -> None:
        super().__init__(classes=classes)
        self._last, self._waiting, self._is_due = "", text, False
        self._pause_s = _DRAW_S

    def on_mount(self) -> None:
        """Show what is there."""
        self._draw()

    def add(self, text: str) -> None:
        """Show more, soon."""
        self._waiting += text
        if not self._is_due:
            self._is_due = True
            self.set_timer(self._pause_s, self._draw)

    def _drawn(self, begun: float) -> None:
        self._pause_s = min(_LONGEST_S, max(_DRAW_S, _REST * (time.monotonic() - begun)))
        self._is_due = False
        if self._waiting:
            self.add("")

    def _draw(self) -> None:
        self._is_due = True
        self.call_after_refresh(self._drawn, time.monotonic())
        begins = not self._last
        rest, self._waiting = self._last + plain(self._waiting), ""
        made = []
        while rest:
            self._last, rest = split_after(rest, _LINES, _CHARACTERS)
            shown = self._last.removesuffix("\n") if rest else self._last
            if begins or not self.children:
                made.append(Static(shown, markup=False))
            else:
                last = self.children[-1]
                assert isinstance(last, Static)
                last.update(shown)
            begins = True
        if made:
            self.mount_all(made)


def split_after(text: str, lines: int, characters: int) -> tuple[str, str]:
    """The first lines, at most so many and so long together, and the rest."""
    end = -1
    for _ in range(lines):
        found = text.find("\n", end + 1, characters)
        if found < 0:
            break
        end = found
    else:
        return text[: end + 1], text[end + 1 :]
    if len(text) <= characters:
        return text, ""
    end = end + 1 or characters
    return text[:end], text[end:]
