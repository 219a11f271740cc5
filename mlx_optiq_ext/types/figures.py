"""How numbers are written for people: with as many digits as they have meaning. Used by reports and cards."""

__all__ = ["FEWEST_WINDOWS", "divergence_text", "interval_text", "number_text", "plus_minus", "size_text"]

FEWEST_WINDOWS = 4
"""Windows that an interval needs to be shown: with fewer, Student's t makes it wider than its subject."""

_LEAST_DIVERGENCE = 1e-6
"""Nats per token; below, the rounding of float32 logits shows more than what is measured."""


def number_text(value: float | None) -> str:
    """Three digits, or a dash where there is no value."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"


def plus_minus(value: float, half: float) -> str:
    """Value and half width of its 95 % interval, with as many digits as the interval has meaning."""
    if not half > 0:
        return number_text(value)
    digits = max(0, 1 - _exponent(half))
    return f"{value:.{digits}f} ± {half:.{digits}f}" if digits <= 6 else f"{value:.2e} ± {half:.1e}"


def interval_text(value: float, half: float, num_windows: int) -> str:
    """As :func:`plus_minus`, and ``± n/a`` where there are too few windows for an interval."""
    if num_windows < FEWEST_WINDOWS:
        return f"{number_text(value)} ± n/a"
    return plus_minus(value, half)


def divergence_text(value: float, half: float, num_windows: int) -> str:
    """A measured divergence as :func:`interval_text`; zero, or the smallest that can be told from it."""
    if value < _LEAST_DIVERGENCE:
        return "0" if value <= 0 else f"<{_LEAST_DIVERGENCE:.0e}".replace("e-0", "e-")
    return interval_text(value, half, num_windows)


def size_text(nbytes: int) -> str:
    """Bytes in decimal units: ``84.1 MB``, ``4.97 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])
