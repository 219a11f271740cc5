"""What a command shows: progress on stderr, one result on stdout.

Knows nothing of what is being done; draws :class:`~mlx_optiq_ext.types.progress.Progress` values and prints
tables and JSON documents. Made by each command from its parsed arguments.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

import msgspec

from mlx_optiq_ext.types.progress import Progress

__all__ = ["Console", "format_duration", "format_table"]

_REDRAW_S = 0.1
_PLAIN_LINE_S = 15.0
_BAR = 24


class Console:
    """Progress drawing and result printing of one command.

    On a terminal one stderr line is redrawn, with rate and time left; elsewhere a line is written when a
    stage starts or ends and every 15 seconds between. Belongs to the thread that made it.
    """

    def __init__(
        self,
        *,
        json_output: bool = False,
        quiet: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.json_output = json_output
        self._quiet = quiet
        self._out = out
        self._err = err
        self._clock = clock
        self._stage = ""
        self._pace = _Pace(0, 0, 0.0)
        self._drawn = -_PLAIN_LINE_S
        self._line_open = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Console":
        """Make the console that ``--json`` and ``--quiet`` ask for."""
        return cls(json_output=getattr(args, "json", False), quiet=getattr(args, "quiet", False))

    @property
    def out(self) -> TextIO:
        """Where results go."""
        return self._out or sys.stdout

    @property
    def err(self) -> TextIO:
        """Where progress and notes go."""
        return self._err or sys.stderr

    def progress(self, event: Progress) -> None:
        """Draw one event: pass this method as the ``ProgressSink`` of a long job."""
        now = self._clock()
        starts = event.stage != self._stage
        if event.note:
            self.note(event.note)
        if starts:
            self._end_line()
            self._stage, self._pace = event.stage, _Pace(event.done, event.replayed, now)
        self._pace.advance(event, now)
        if self._quiet:
            return
        ends = event.done >= event.total
        on_terminal = self.err.isatty()
        if not (starts or ends or now - self._drawn >= (_REDRAW_S if on_terminal else _PLAIN_LINE_S)):
            return
        self._drawn = now
        line = self._line(event, now)
        if on_terminal:
            # A line that wraps could not be redrawn.
            width = shutil.get_terminal_size().columns - 1
            self.err.write(f"\r\x1b[2K{line[:width]}")
            self._line_open = True
            if ends:
                self._end_line()
        else:
            self.err.write(f"{line}\n")
        self.err.flush()

    def note(self, text: str) -> None:
        """Write one line for the user on stderr."""
        self._end_line()
        print(text, file=self.err, flush=True)

    def result(self, document: object, text: str) -> None:
        """Print the command's one result: ``document`` as JSON with ``--json``, else ``text``.

        Args:
            document: Anything msgspec encodes: Structs, dicts, lists, numbers.
            text: The same for people.
        """
        self._end_line()
        if self.json_output:
            encoded = msgspec.json.format(msgspec.json.encode(document), indent=2)
            print(encoded.decode(), file=self.out, flush=True)
        else:
            print(text, file=self.out, flush=True)

    def _end_line(self) -> None:
        if self._line_open:
            self.err.write("\n")
            self._line_open = False

    def _line(self, event: Progress, now: float) -> str:
        total = max(event.total, 1)
        share = min(max(event.done / total, 0.0), 1.0)
        bar = "█" * round(share * _BAR) + "░" * (_BAR - round(share * _BAR))
        parts = [f"{event.stage:<10s} {bar} {event.done}/{event.total}"]
        rate = self._pace.per_second
        if event.done >= event.total:
            parts.append(f"{format_duration(now - self._pace.started)}")
        elif rate > 0:
            parts.append(f"{rate:.1f}/s, {format_duration((event.total - event.done) / rate)} left")
        if event.detail:
            parts.append(event.detail)
        return "  ".join(parts)


class _Pace:
    """How fast a stage goes, from what was worked on and not from what an earlier run had finished.

    Args:
        done: Count of the stage's first event.
        replayed: How many of them were replayed.
        now: When it came.
    """

    def __init__(self, done: int, replayed: int, now: float) -> None:
        self.started = now
        self._last = (done, replayed, now)
        self._worked_s = 0.0
        self._worked = 0

    def advance(self, event: Progress, now: float) -> None:
        """Count the step to ``event``; one that was replayed leaves its time out too."""
        done, replayed, then = self._last
        self._last = (event.done, event.replayed, now)
        fresh = (event.done - done) - (event.replayed - replayed)
        if event.replayed == replayed or fresh > 0:
            self._worked_s += now - then
            self._worked += max(fresh, 0)

    @property
    def per_second(self) -> float:
        """Steps per second; 0 as long as too little was seen."""
        return self._worked / self._worked_s if self._worked > 0 and self._worked_s > 1.0 else 0.0


def format_duration(seconds: float) -> str:
    """``8 s``, ``2:05``, ``1:02:03``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Lay out cells in aligned columns: the first column to the left, numbers to the right.

    Args:
        headers: One per column.
        rows: Cells as text; each row as long as ``headers``.
        title: Written above, where given.
    """
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    is_number = [
        bool(rows) and all(_looks_numeric(cell) for cell in column[1:]) and index > 0
        for index, column in enumerate(columns)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    lines = [line(headers), rule, *(line(row) for row in rows)]
    return "\n".join([title, *lines] if title else lines)


def _looks_numeric(cell: str) -> bool:
    return not cell.strip("–- ") or cell.lstrip("+-−×≤≥<~").replace(",", "")[:1].isdigit()
