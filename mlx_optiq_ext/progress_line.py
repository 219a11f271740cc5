"""Progress of a long job as one line: redrawn on a terminal, written now and then elsewhere, or as JSON.

Knows nothing of what is in progress. Used by the command line's console and by the stock commands' "optiq"
recipe.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

import msgspec

from mlx_optiq_ext.types.progress import Progress

__all__ = ["JsonProgress", "ProgressLine", "format_duration"]

_REDRAW_S = 0.1
_PLAIN_LINE_S = 15.0
_BAR = 24


class ProgressLine:
    """A progress sink that draws, with rate and time left.

    On a terminal one line is redrawn; elsewhere a line is written when a stage starts or ends and every 15
    seconds between. Belongs to the thread that made it. As a context it ends the line that is open.

    Args:
        stream: Where to draw; stderr as it is at the time, by default.
        prefix: Put before every line.
        quiet: Draw nothing; notes are written all the same.
        clock: Seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        prefix: str = "",
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given_stream = stream
        self._prefix = prefix
        self._quiet = quiet
        self._clock = clock
        self._stage, self._done, self._is_over = "", 0, False
        self._pace = _Pace(0, 0, 0.0)
        self._drawn = -_PLAIN_LINE_S
        self._is_open = False

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line that is being drawn."""
        self.end()

    def __call__(self, event: Progress) -> None:
        """Draw one event."""
        now = self._clock()
        # A stage that counts from the beginning again is another one; its last event may come twice.
        starts = event.stage != self._stage or event.done < self._done
        repeats = not starts and self._is_over and event.done == self._done
        self._done, self._is_over = event.done, event.done >= event.total
        if event.note:
            self.note(event.note)
        if starts:
            self.end()
            self._stage, self._pace = event.stage, _Pace(event.done, event.replayed, now)
        self._pace.advance(event, now)
        ends = self._is_over
        if self._quiet or repeats:
            return
        on_terminal = self._stream.isatty()
        if not (starts or ends or now - self._drawn >= (_REDRAW_S if on_terminal else _PLAIN_LINE_S)):
            return
        self._drawn = now
        line = self._prefix + self._line(event, now)
        if on_terminal:
            # A line that wraps could not be redrawn.
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[2K{line[:width]}")
            self._is_open = True
            if ends:
                self.end()
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Write one line that stays."""
        self.end()
        self._stream.write(f"{self._prefix}{text}\n")
        self._stream.flush()

    def end(self) -> None:
        """End the line that is being drawn, if one is."""
        if self._is_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_open = False

    @property
    def _stream(self) -> TextIO:
        return self._given_stream or sys.stderr

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


class JsonProgress:
    """A progress sink for programs: one JSON object a line.

    ``{"stage", "done", "total", "detail", "replayed", "seconds", "seconds_left", "values"}``, at most ten a
    second and always the first and the last of a stage; ``seconds_left`` is null while unknown. Notes are
    ``{"note"}``; whatever else a command finds has a name of its own.
    Belongs to the thread that made it.

    Args:
        stream: Where to write; stderr as it is at the time, by default.
        clock: Seconds.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stage, self._done = "", 0
        self._pace = _Pace(0, 0, 0.0)
        self._written = -_REDRAW_S

    def __call__(self, event: Progress) -> None:
        """Write one event, or leave it out where another came just before."""
        now = self._clock()
        starts = event.stage != self._stage or event.done < self._done
        self._stage, self._done = event.stage, event.done
        if event.note:
            self.note(event.note)
        if starts:
            self._pace = _Pace(event.done, event.replayed, now)
        self._pace.advance(event, now)
        if not (starts or event.done >= event.total or now - self._written >= _REDRAW_S):
            return
        self._written = now
        rate = self._pace.per_second
        self.write(
            {
                "stage": event.stage,
                "done": event.done,
                "total": event.total,
                "detail": event.detail,
                "replayed": event.replayed,
                "seconds": round(now - self._pace.started, 3),
                "seconds_left": round(max(event.total - event.done, 0) / rate, 1) if rate > 0 else None,
                "values": event.values,
            }
        )

    def note(self, text: str) -> None:
        """Write a line for the user."""
        self.write({"note": text})

    def end(self) -> None:
        """Nothing is open between lines."""

    def write(self, document: Mapping[str, object]) -> None:
        """Write one object."""
        stream = self._stream or sys.stderr
        stream.write(f"{msgspec.json.encode(document).decode()}\n")
        stream.flush()


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
