"""How numbers are written for people: with as many digits as they have meaning. Used by reports and cards."""

__all__ = ["number_text", "plus_minus", "size_text"]


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


def size_text(nbytes: int) -> str:
    """Bytes in decimal units: ``84.1 MB``, ``4.97 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])
