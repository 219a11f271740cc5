"""The last lines of the log, for those who ask over HTTP.

A handler of Python's logging; knows nothing of who writes. Attached by ``engine``.
"""

import logging
import threading
from collections import deque

from mlx_optiq_ext.types.port import LogLine

__all__ = ["LogRing"]


class LogRing(logging.Handler):
    """Keeps the newest lines.

    Args:
        limit: How many.
    """

    def __init__(self, limit: int = 2000) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[LogLine] = deque(maxlen=limit)
        self._number = 0
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record; its traceback stays out, for it tells of this machine's folders."""
        with self._guard:
            self._number += 1
            self._lines.append(
                LogLine(
                    number=self._number, time=record.created, level=record.levelname, text=record.getMessage()
                )
            )

    def lines(self, after: int) -> tuple[LogLine, ...]:
        """Those newer than number ``after``, oldest first."""
        with self._guard:
            return tuple(line for line in self._lines if line.number > after)
