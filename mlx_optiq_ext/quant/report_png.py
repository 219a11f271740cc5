"""A report as one PNG picture. The only module that needs Pillow (extra ``report``)."""

import io
from typing import Any

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.quant.picture import INKS, Dot, Line, Path, Rect, Scene, Shape, Text
from mlx_optiq_ext.quant.picture_curve import curve_scene
from mlx_optiq_ext.quant.picture_heat import bits_scene, sensitivity_scene
from mlx_optiq_ext.quant.picture_table import facts_scene, list_scene, table_scene
from mlx_optiq_ext.types.report import Report

__all__ = ["render_png", "report_scenes"]

_MARGIN = 40.0
_BETWEEN = 34.0
_SMOOTH = 2
"""Extra resolution while drawing, averaged away at the end: smooth edges."""
# The face that comes with Pillow has Latin-1 only.
_SPELLED = str.maketrans({"–": "-", "−": "-", "→": "->", "×": "x", "‖": "||", "’": "'", "≤": "<="})


def render_png(report: Report, *, is_dark: bool = False, scale: int = 2) -> bytes:
    """Draw every part that the report has, one below the other.

    Args:
        report: What to show.
        is_dark: Draw on a dark page.
        scale: Pixels per CSS pixel; 2 is sharp on dense screens.
    Returns:
        Bytes of a PNG file.
    Raises:
        UsageError: Pillow is not installed.
    """
    pillow = _pillow()
    scenes = report_scenes(report)
    width = max((scene.width for scene in scenes), default=960.0) + 2 * _MARGIN
    heights = [_heading_height(scene) + scene.height + _BETWEEN for scene in scenes]
    height = sum(heights) + 2 * _MARGIN + 34 - (_BETWEEN if scenes else 0)
    brush = _Brush(pillow, width, height, scale, is_dark)
    brush.draw(Text(x=_MARGIN, y=_MARGIN + 20, text=report.title, size=24, is_bold=True))
    top = _MARGIN + 46
    for scene, used in zip(scenes, heights, strict=True):
        brush.origin = (_MARGIN, top)
        if scene.title:
            brush.draw(Text(x=0, y=16, text=scene.title, size=17, is_bold=True))
            brush.draw(Text(x=0, y=35, text=scene.subtitle, ink="muted", size=12))
        brush.origin = (_MARGIN, top + _heading_height(scene))
        for shape in scene.shapes:
            brush.draw(shape)
        top += used
    return brush.png()


def report_scenes(report: Report) -> list[Scene]:
    """The parts of a report as scenes, in the order they are drawn."""
    scenes = [facts_scene(report.facts) if report.facts else None]
    scenes.append(table_scene(report.comparison) if report.comparison else None)
    scenes.append(curve_scene(report.curve) if report.curve else None)
    if report.heat_map:
        scenes += [bits_scene(report.heat_map), sensitivity_scene(report.heat_map)]
    scenes += [table_scene(table) for table in (report.bits, report.domains, report.pins) if table]
    for title, items in (("Missing", report.missing), ("Notes", report.notes)):
        scenes.append(list_scene(title, items) if items else None)
    return [scene for scene in scenes if scene is not None]


def _heading_height(scene: Scene) -> float:
    if not scene.title:
        return 0.0
    return 48.0 if scene.subtitle else 28.0


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont  # deferred: an optional extra
    except ImportError as error:
        message = "a PNG report needs Pillow: pip install 'mlx-optiq-ext[report]', or use --format html"
        raise UsageError(message) from error
    return PIL


class _Brush:
    """Draws shapes on a Pillow image; ``origin`` is added to every position."""

    def __init__(self, pillow: Any, width: float, height: float, scale: int, is_dark: bool) -> None:
        self._pillow = pillow
        self._zoom = scale * _SMOOTH
        self._is_dark = is_dark
        self._image: Any = pillow.Image.new("RGB", (self._px(width), self._px(height)), self._color("page"))
        self._pen: Any = pillow.ImageDraw.Draw(self._image)
        self._fonts: dict[float, Any] = {}
        self.origin = (0.0, 0.0)

    def draw(self, shape: Shape) -> None:
        """Draw one shape."""
        if isinstance(shape, Rect):
            self._rect(shape)
        elif isinstance(shape, Line):
            ends = [self._at(shape.x1, shape.y1), self._at(shape.x2, shape.y2)]
            self._pen.line(ends, fill=self._color(shape.ink), width=max(self._px(shape.width), 1))
        elif isinstance(shape, Path):
            points = [self._at(x, y) for x, y in shape.points]
            self._pen.line(points, fill=self._color(shape.ink), width=self._px(shape.width), joint="curve")
        elif isinstance(shape, Dot):
            self._dot(shape)
        else:
            self._text(shape)

    def png(self) -> bytes:
        """The picture at its final resolution."""
        width, height = self._image.size
        small = self._image.resize((width // _SMOOTH, height // _SMOOTH), self._pillow.Image.Resampling.BOX)
        buffer = io.BytesIO()
        small.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()

    def _rect(self, rect: Rect) -> None:
        left, top = self._at(rect.x, rect.y)
        right, bottom = self._at(rect.x + rect.width, rect.y + rect.height)
        box = (left, top, max(right - 1, left), max(bottom - 1, top))
        self._pen.rounded_rectangle(box, radius=self._px(rect.radius), fill=self._color(rect.fill))

    def _dot(self, dot: Dot) -> None:
        inner = dot.ink if dot.is_filled else "page"
        edge = "page" if dot.is_filled else dot.ink
        width = self._px(1.5 if dot.is_filled else 2.5)
        x, y = self._at(dot.x, dot.y)
        reach = self._px(dot.radius * (1.2 if dot.is_diamond else 1.0) + (0.75 if dot.is_filled else 1.25))
        if dot.is_diamond:
            for size, ink in ((reach, edge), (reach - width * 1.4, inner)):
                corners = [(x, y - size), (x + size, y), (x, y + size), (x - size, y)]
                self._pen.polygon(corners, fill=self._color(ink))
        else:
            box = (x - reach, y - reach, x + reach, y + reach)
            self._pen.ellipse(box, fill=self._color(inner), outline=self._color(edge), width=width)

    def _text(self, text: Text) -> None:
        if text.size not in self._fonts:
            self._fonts[text.size] = self._pillow.ImageFont.load_default(text.size * self._zoom)
        color = self._color(text.ink)
        self._pen.text(
            self._at(text.x, text.y),
            text.text.translate(_SPELLED),
            fill=color,
            font=self._fonts[text.size],
            anchor={"start": "ls", "middle": "ms", "end": "rs"}[text.anchor],
            stroke_width=self._px(0.3) if text.is_bold else 0,
            stroke_fill=color,
        )

    def _color(self, ink: str) -> str:
        return ink if ink.startswith("#") else INKS[ink][self._is_dark]

    def _px(self, length: float) -> int:
        return round(length * self._zoom)

    def _at(self, x: float, y: float) -> tuple[int, int]:
        return self._px(self.origin[0] + x), self._px(self.origin[1] + y)
