"""What the server's snapshots were a while ago: series for sparklines.

Knows numbers and no widget. The clock is the server's uptime, so a recording gives the same series.
"""

from collections import deque

from mlx_optiq_ext.types.status import EngineStatus, RowStatus

__all__ = ["POINT_S", "History"]

POINT_S = 0.9
"""Least time between two points; the server tells about once a second."""
_KEPT = 240
_KEPT_FIRST_TOKENS = 60


class History:
    """Series of one run of a server; begins anew when the server does."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.decode: deque[float] = deque(maxlen=_KEPT)
        """Tokens per second of all rows."""
        self.prefill: deque[float] = deque(maxlen=_KEPT)
        self.running: deque[float] = deque(maxlen=_KEPT)
        """Rows in the batch."""
        self.first_token_s: deque[float] = deque(maxlen=_KEPT_FIRST_TOKENS)
        """Time to the first token of one request after the other."""
        self.rows: dict[str, deque[float]] = {}
        """Tokens per second between two points, by row."""
        self._told: set[str] = set()
        self._last: EngineStatus | None = None

    def add(self, status: EngineStatus) -> bool:
        """Take a snapshot; whether it made a point."""
        if self._last is not None and status.uptime_s < self._last.uptime_s:
            self._clear()
        self._note_first_tokens(status)
        last = self._last
        if last is not None and status.uptime_s - last.uptime_s < POINT_S:
            return False
        self.decode.append(status.decode_tokens_per_s)
        self.prefill.append(status.prefill_tokens_per_s)
        self.running.append(sum(row.state != "queued" for row in status.rows))
        before = {row.id: row for row in last.rows} if last is not None else {}
        seconds = status.uptime_s - last.uptime_s if last is not None else 0.0
        self.rows = {
            row.id: self._with_rate(row, before.get(row.id), seconds)
            for row in status.rows
            if row.state == "decode"
        }
        self._last = status
        return True

    def _with_rate(self, row: RowStatus, before: RowStatus | None, seconds: float) -> deque[float]:
        series = self.rows.get(row.id, deque(maxlen=_KEPT))
        if before is not None and seconds > 0:
            series.append((row.completion_tokens - before.completion_tokens) / seconds)
        return series

    def _note_first_tokens(self, status: EngineStatus) -> None:
        for row in status.rows:
            if row.first_token_s is not None and row.id not in self._told:
                self._told.add(row.id)
                self.first_token_s.append(row.first_token_s)
        self._told &= {row.id for row in status.rows}
