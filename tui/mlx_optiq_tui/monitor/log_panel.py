"""The server's log as it grows, with a filter."""

import time
from collections import deque

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Input, RichLog

from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.themes import Inks

__all__ = ["LogPanel", "matches"]

_KEPT = 2000
_BAD = ("WARNING", "ERROR", "CRITICAL")


class LogPanel(Vertical):
    """The last lines, of which those that match the filter are shown."""

    DEFAULT_CSS = """
    LogPanel Input { height: 1; border: none; padding: 0 1; background: $panel; }
    LogPanel RichLog { height: 1fr; background: $surface; padding: 0 1; }
    """

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._lines: deque[LogLine] = deque(maxlen=_KEPT)

    def compose(self) -> ComposeResult:
        """Filter and lines."""
        yield Input(
            placeholder="filter: words that a line must have; error, warning, …", id="filter", compact=True
        )
        yield RichLog(max_lines=_KEPT, wrap=True)

    def add(self, line: LogLine) -> None:
        """Take a new line."""
        self._lines.append(line)
        if matches(line, self.query_one(Input).value):
            self._write(line)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what matches."""
        event.stop()
        self._refill()

    def on_resize(self) -> None:
        """Break lines anew."""
        self.call_after_refresh(self._refill)

    def _refill(self) -> None:
        words = self.query_one(Input).value
        self.query_one(RichLog).clear()
        shown = [line for line in self._lines if matches(line, words)]
        for line in shown:
            self._write(line)
        if self._lines and not shown:
            self.query_one(RichLog).write(Text(f"no line has {words!r}", "dim"))

    def _write(self, line: LogLine) -> None:
        log = self.query_one(RichLog)
        log.write(_drawn(line, lab_of(self).inks), width=max(log.scrollable_content_region.width, 20))


def matches(line: LogLine, words: str) -> bool:
    """Whether a line has every word, in its level or text, in any case."""
    text = f"{line.level} {line.text}".lower()
    return all(word in text for word in words.lower().split())


def _drawn(line: LogLine, inks: Inks) -> Text:
    text = Text(time.strftime("%H:%M:%S ", time.localtime(line.time)), "dim")
    text.append(f"{line.level:<8}", inks.bad if line.level in _BAD else "dim")
    return text.append(line.text)
