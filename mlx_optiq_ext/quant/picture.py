"""Pictures as plain shapes, so that one layout serves SVG and PNG.

Knows nothing of reports or of how shapes become pixels. Units are CSS pixels, y grows downward. A colour is
``#rrggbb`` or the name of an ink in :data:`INKS`, which a light and a dark page draw differently.
"""

from typing import TypeAlias

import msgspec

__all__ = ["INKS", "Dot", "Line", "Path", "Rect", "Scene", "Shape", "Text", "text_width"]

INKS: dict[str, tuple[str, str]] = {
    "page": ("#ffffff", "#12151a"),
    "panel": ("#f5f6f8", "#1b2027"),
    "text": ("#1a1d21", "#e8eaed"),
    "muted": ("#5c6470", "#9aa3af"),
    "grid": ("#dfe2e7", "#2c333d"),
    "line": ("#2a788e", "#4fb3cd"),
    "chosen": ("#d9480f", "#ff9f43"),
    "uniform": ("#7a828e", "#9aa3af"),
    "empty": ("#eceef1", "#22272f"),
}
"""Ink name → colour on a light page, on a dark page."""


class Rect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A filled rectangle; ``tip`` is shown where the medium has tooltips."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    radius: float = 0.0
    tip: str = ""


class Line(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    ink: str
    width: float = 1.0


class Path(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Straight lines through ``points``."""

    points: tuple[tuple[float, float], ...]
    ink: str
    width: float = 2.0


class Dot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A marker: a circle or a diamond, filled or as an outline on the page's colour."""

    x: float
    y: float
    radius: float
    ink: str
    is_filled: bool = True
    is_diamond: bool = False
    tip: str = ""


class Text(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    ink: str = "text"
    size: float = 13.0
    anchor: str = "start"
    """start, middle or end: which point of the text is at ``x``."""
    is_bold: bool = False


Shape: TypeAlias = Rect | Line | Path | Dot | Text


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """A picture with its heading, which the medium draws above it."""

    title: str
    width: float
    height: float
    shapes: tuple[Shape, ...]
    subtitle: str = ""


def text_width(text: str, size: float = 13.0) -> float:
    """Approximate width of text in a proportional sans-serif face; errs on the wide side."""
    return sum(0.34 if letter in " .,:;|'ijlt()[]" else 0.64 for letter in text) * size
