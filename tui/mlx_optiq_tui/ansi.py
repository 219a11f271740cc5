"""Colour on a terminal: 24-bit, 256 colours or none.

Knows nothing of what is drawn. The caller says what the terminal can do; :func:`detect_colors` finds out.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from mlx_optiq_ext.types.palette import parse_hex

__all__ = ["ColorDepth", "Style", "detect_colors", "paint"]

ColorDepth = Literal["none", "256", "truecolor"]

_CUBE = (0, 95, 135, 175, 215, 255)


class Style(msgspec.Struct, frozen=True, kw_only=True):
    """What the terminal can show."""

    colors: ColorDepth = "none"
    width: int = 80
    """Columns; pictures never draw beyond."""


def detect_colors(environ: Mapping[str, str], *, is_terminal: bool) -> ColorDepth:
    """Which colours to use.

    Args:
        environ: Environment of the process.
        is_terminal: Whether the output is a terminal.
    Returns:
        ``none`` where the output is no terminal, is dumb, or ``NO_COLOR`` is set; ``FORCE_COLOR`` overrides
        the first. ``truecolor`` where ``COLORTERM`` says so, else ``256``.
    Source: https://no-color.org
    """
    if environ.get("NO_COLOR"):
        return "none"
    if not environ.get("FORCE_COLOR") and (not is_terminal or environ.get("TERM", "dumb") == "dumb"):
        return "none"
    is_truecolor = environ.get("COLORTERM", "").lower() in {"truecolor", "24bit"}
    return "truecolor" if is_truecolor or environ.get("FORCE_COLOR") == "3" else "256"


def paint(
    text: str, style: Style, *, ink: str = "", on: str = "", bold: bool = False, dim: bool = False
) -> str:
    """Wrap ``text`` in colour codes, or return it as it is where the terminal has no colours.

    Args:
        text: One line.
        style: What the terminal can show.
        ink: Colour of the characters, ``#rrggbb``.
        on: Colour behind them.
        bold: Heavier characters.
        dim: Lighter characters.
    """
    if style.colors == "none" or not text:
        return text
    codes = (["1"] if bold else []) + (["2"] if dim else [])
    for color, layer in ((ink, 38), (on, 48)):
        if color:
            codes.append(_color_code(color, layer, style.colors))
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text


def _color_code(color: str, layer: int, depth: ColorDepth) -> str:
    red, green, blue = parse_hex(color)
    if depth == "truecolor":
        return f"{layer};2;{red};{green};{blue}"
    return f"{layer};5;{_nearest_256(red, green, blue)}"


def _nearest_256(red: int, green: int, blue: int) -> int:
    """Index in the 256-colour table: the nearest of the 6×6×6 cube and the grey ramp.

    Source: xterm's 256-colour table.
    """
    steps = [min(range(6), key=lambda i: abs(_CUBE[i] - channel)) for channel in (red, green, blue)]
    in_cube = (16 + 36 * steps[0] + 6 * steps[1] + steps[2], tuple(_CUBE[i] for i in steps))
    grey = min(range(24), key=lambda i: abs(8 + 10 * i - (red + green + blue) / 3))
    in_greys = (232 + grey, (8 + 10 * grey,) * 3)

    def distance(candidate: tuple[int, tuple[int, ...]]) -> int:
        return sum((a - b) ** 2 for a, b in zip(candidate[1], (red, green, blue), strict=True))

    return min(in_cube, in_greys, key=distance)[0]
