"""What happened since the start: numbers for health, metrics and the dashboard.

Written on the owner thread, read for snapshots. Knows no request.
"""

import bisect
import time
from collections import Counter, deque

from mlx_optiq_ext.types.events import Usage
from mlx_optiq_ext.types.status import LatencySum

__all__ = ["Counters", "Histogram", "Rate"]

_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RATE_SPAN_S = 10.0


class Histogram:
    """Durations in seconds, counted by upper bound."""

    def __init__(self, bounds: tuple[float, ...] = _BOUNDS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> LatencySum:
        """The counts so far."""
        return LatencySum(
            bounds=self._bounds, counts=tuple(self._counts), total=self._total, number=sum(self._counts)
        )


class Rate:
    """Things per second over the last ten seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, number: int) -> None:
        """Count some, now."""
        self._seen.append((time.monotonic(), number))

    def per_second(self) -> float:
        """Over the span, or since the first if that is shorter."""
        now = time.monotonic()
        while self._seen and self._seen[0][0] < now - _RATE_SPAN_S:
            self._seen.popleft()
        if not self._seen:
            return 0.0
        span = max(now - self._seen[0][0], 0.5)
        return sum(number for _, number in self._seen) / span


class Counters:
    """Everything that only grows, and the rates."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests = 0
        self.finished: Counter[str] = Counter()
        self.adapters: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.restarts = 0
        self.decoded = Rate()
        self.prefilled = Rate()
        self.time_to_first_token = Histogram()
        self.request_time = Histogram()

    def end(self, how: str, usage: Usage, seconds: float) -> None:
        """Count one job that ended: its finish reason, or the kind of its error."""
        self.finished[how] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.request_time.add(seconds)
