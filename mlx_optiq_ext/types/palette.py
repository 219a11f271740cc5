"""Colours of the pictures: two ramps with rising lightness, readable with any colour vision.

Shared by the terminal, HTML and PNG faces; knows nothing of what is drawn.
Source: sample points of matplotlib's viridis and inferno maps (public domain, CC0).
"""

from collections.abc import Sequence

__all__ = ["BITS_LEVELS", "SENSITIVITY_RAMP", "bits_color", "ink_on", "parse_hex", "ramp_color"]

BITS_LEVELS: tuple[tuple[int, str], ...] = (
    (2, "#482475"),
    (3, "#3d4f8a"),
    (4, "#2a788e"),
    (5, "#1f9d88"),
    (6, "#50c46a"),
    (8, "#b0dd2f"),
    (16, "#fde725"),
)
"""Nominal bits and their colour, ascending; 16 stands for every unquantized tensor."""

SENSITIVITY_RAMP: tuple[str, ...] = (
    "#1b0c41",
    "#4a0c6b",
    "#781c6d",
    "#a52c60",
    "#cf4446",
    "#ed6925",
    "#fb9b06",
    "#f7d13d",
    "#fcffa4",
)
"""Evenly spaced stops from the least to the most sensitive."""


def parse_hex(color: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of ``#rrggbb``."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def bits_color(bits: int) -> str:
    """Colour of a nominal width: that of the narrowest level that is at least as wide."""
    for level, color in BITS_LEVELS:
        if bits <= level:
            return color
    return BITS_LEVELS[-1][1]


def ramp_color(fraction: float, ramp: Sequence[str] = SENSITIVITY_RAMP) -> str:
    """Colour at ``fraction`` (clipped to 0 … 1) of a ramp, between its two nearest stops."""
    position = min(max(fraction, 0.0), 1.0) * (len(ramp) - 1)
    index = min(int(position), len(ramp) - 2)
    share = position - index
    low, high = parse_hex(ramp[index]), parse_hex(ramp[index + 1])
    mixed = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on ``color``.

    Source: WCAG 2.2, relative luminance and contrast ratio.
    """
    channels = [c / 255 for c in parse_hex(color)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
