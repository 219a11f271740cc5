"""Small pictures made of text: sparklines, bars of several parts, columns.

Pure functions from numbers to lines; colours are given by the caller, and every picture can be read without
them.
"""

from collections.abc import Sequence

import msgspec
from rich.text import Text

__all__ = ["Part", "columns", "legend", "share_bar", "sparkline"]

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_FILLS = "█▓▒░"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a whole."""

    label: str
    value: float
    shown: str
    """The value for people."""
    color: str


def sparkline(values: Sequence[float], width: int, most: float = 0.0) -> str:
    """The last ``width`` values as a line of blocks, from 0 to ``most`` or the largest of them."""
    shown = list(values)[-width:]
    top = max(most, *shown, 1e-12) if shown else 1.0
    marks = (_EIGHTHS[_height(value / top, 1)] for value in shown)
    return "".join(marks).rjust(width)


def share_bar(parts: Sequence[Part], total: float, width: int) -> Text:
    """A bar of ``width`` cells, filled by the parts in turn, each with a shade and a colour of its own."""
    text = Text(no_wrap=True)
    total = max(total, sum(part.value for part in parts), 1e-12)
    done, used = 0.0, 0
    for index, part in enumerate(parts):
        done += part.value
        end = round(done / total * width)
        text.append(_FILLS[index % len(_FILLS)] * (end - used), part.color)
        used = end
    text.append("·" * (width - used), "dim")
    return text


def legend(parts: Sequence[Part]) -> Text:
    """What the shades of :func:`share_bar` stand for."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for index, part in enumerate(parts):
        text.append(_FILLS[index % len(_FILLS)], part.color)
        text.append(f" {part.label} {part.shown}  ")
    return text


def columns(values: Sequence[float], colors: Sequence[str], height: int, cell: int) -> Text:
    """Columns of ``cell`` characters, side by side, the largest ``height`` lines high."""
    top = max([*values, 1e-12])
    heights = [_height(value / top, height) for value in values]
    lines = []
    for line in reversed(range(height)):
        text = Text(no_wrap=True)
        for eighths, color in zip(heights, colors, strict=True):
            mark = _EIGHTHS[min(max(eighths - 8 * line, 0), 8)]
            text.append((mark * max(cell - 1, 1)).ljust(cell), color)
        lines.append(text)
    return Text("\n").join(lines)


def _height(share: float, lines: int) -> int:
    """Eighths of a line; what is above nothing shows."""
    eighths = round(min(max(share, 0.0), 1.0) * 8 * lines)
    return max(eighths, 1) if share > 0 else 0
