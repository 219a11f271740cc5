"""Progress of a conversion on stderr, for mlx-lm's own commands.

Knows nothing of what is in progress. Called by ``convert_call``.
"""

import sys
import time
from types import TracebackType
from typing import TextIO

from mlx_optiq_ext.types.progress import Progress

__all__ = ["StderrProgress"]

_REDRAW_S = 0.1
_LOG_S = 10.0


class StderrProgress:
    """A progress sink: one line that is redrawn on a terminal, a line now and then elsewhere.

    Args:
        stream: Where to write; stderr by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._stage = ""
        self._written_s = 0.0
        self._width = 0

    def __enter__(self) -> "StderrProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line that is being drawn."""
        self._end_line()

    def __call__(self, progress: Progress) -> None:
        """Draw one event."""
        now = time.monotonic()
        if progress.note:
            self._end_line()
            self._stream.write(f"[optiq] {progress.note}\n")
        is_new = progress.stage != self._stage
        is_last = progress.done >= progress.total
        pause = _REDRAW_S if self._is_terminal else _LOG_S
        if not (is_new or is_last) and now - self._written_s < pause:
            return
        if is_new:
            self._end_line()
        self._stage, self._written_s = progress.stage, now
        line = f"[optiq] {progress.stage} {progress.done}/{progress.total} {progress.detail}".rstrip()
        if self._is_terminal:
            self._stream.write(f"\r{line:<{self._width}}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def _end_line(self) -> None:
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0
