"""Numbers of bytes as people write and read them."""

import re

from mlx_optiq_ext.errors import UsageError

__all__ = ["format_nbytes", "parse_nbytes"]

_SIZE = re.compile(r"^\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_nbytes(text: str, *, flag: str = "size") -> int:
    """Bytes in ``4.5GB``, ``900MB``, ``4.5G`` (decimal, 1000-based) or ``4GiB`` (1024-based).

    Raises:
        UsageError: No such size.
    """
    match = _SIZE.match(text)
    if not match or not (match[2] or match[4]) or (match[3] and not match[2]):
        raise UsageError(f"{flag} {text!r} is not a size; write it like 4.5GB, 900MB or 4GiB")
    base = 1024 if match[3] else 1000
    nbytes = int(float(match[1]) * base ** _POWER[match[2].lower()])
    if nbytes <= 0:
        raise UsageError(f"{flag} {text!r} is nothing; write it like 4.5GB, 900MB or 4GiB")
    return nbytes


def format_nbytes(nbytes: float) -> str:
    """Decimal size for people: ``4.52 GB``, ``88.4 MB``, ``12 kB``."""
    if abs(nbytes) >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    if abs(nbytes) >= 1e6:
        return f"{nbytes / 1e6:.1f} MB"
    return f"{nbytes / 1e3:.0f} kB"
