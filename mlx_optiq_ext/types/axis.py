"""Axes of the pictures: a value range, where a value lies on it, and which ticks it gets."""

import math

import msgspec

__all__ = ["LinearAxis", "LogAxis", "tick_text"]


class LinearAxis(msgspec.Struct, frozen=True, kw_only=True):
    """Values from ``low`` to ``high``, evenly spaced."""

    low: float
    high: float

    def fraction(self, value: float) -> float:
        """Place of ``value``: 0 at ``low``, 1 at ``high``; outside values are clipped."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self, most: int = 8) -> tuple[float, ...]:
        """At most ``most`` round values within the range."""
        for step in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first + 1 <= most:
                return tuple(i * step for i in range(first, last + 1))
        return (self.low, self.high)


class LogAxis(msgspec.Struct, frozen=True, kw_only=True):
    """Positive values from ``low`` to ``high``, evenly spaced by ratio."""

    low: float
    high: float

    @classmethod
    def around(cls, values: list[float], most_decades: float = 6.0, margin: float = 1.0) -> "LogAxis | None":
        """Axis holding all positive ``values``, or None if there is none.

        Args:
            values: What will be drawn; zero and negative values are left out.
            most_decades: Smaller values than this below the largest are clipped.
            margin: Factor of room at both ends.
        """
        positive = [v for v in values if v > 0 and math.isfinite(v)]
        if not positive:
            return None
        high = max(positive)
        low = max(min(positive), high / 10**most_decades)
        if high / low < 1.5:
            low, high = low / 1.5, high * 1.5
        return cls(low=low / margin, high=high * margin)

    def fraction(self, value: float) -> float:
        """Place of ``value``: 0 at ``low``, 1 at ``high``; outside values are clipped."""
        if value <= self.low:
            return 0.0
        return min(math.log(value / self.low) / math.log(self.high / self.low), 1.0)

    def ticks(self, most: int = 8) -> tuple[float, ...]:
        """At most ``most`` of 1, 2, 5 × powers of ten, thinned to powers of ten where these are many."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for digits, stride in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
            values = [d * 10.0**e for e in range(first, last + 1) if e % stride == 0 for d in digits]
            inside = tuple(v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9))
            if len(inside) <= most:
                return inside
        return (self.low, self.high)


def tick_text(value: float) -> str:
    """Short text of a tick: ``0.05``, ``2``, ``1e-5``."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
