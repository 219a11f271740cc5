"""Bits against divergence as shapes: the predicted curve, uniform points, and what was measured."""

from collections.abc import Sequence
from itertools import pairwise

from msgspec.structs import replace

from mlx_optiq_ext.quant.picture import Dot, Line, Path, Rect, Scene, Shape, Text, text_width
from mlx_optiq_ext.types.axis import LinearAxis, LogAxis, tick_text
from mlx_optiq_ext.types.report import Curve, CurvePoint

__all__ = ["curve_scene"]

_WIDTH, _HEIGHT = 960.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 16.0, 10.0, 46.0
_LABEL = 12.0

Box = tuple[float, float, float, float]


def curve_scene(curve: Curve) -> Scene | None:
    """Plot a curve; None where no point has positive divergence.

    Labels are placed where they hide neither a point, nor the line, nor each other; a label with no such
    place is left out (its point stays, and is in the tooltip).
    """
    chosen = (curve.chosen,) if curve.chosen else ()
    points = (*curve.predicted, *curve.uniform, *chosen, *curve.measured, *curve.measured_uniform)
    y_axis = LogAxis.around([p.divergence for p in points], margin=1.3)
    if y_axis is None:
        return None
    x_axis = LinearAxis(low=min(p.bpw for p in points) - 0.3, high=max(p.bpw for p in points) + 0.3)
    plot = _Plot(x_axis, y_axis)
    shapes: list[Shape] = plot.axes()
    legend, legend_box = _legend(curve)
    plot.taken.append(legend_box)
    if len(curve.predicted) > 1:
        shapes.append(plot.path(curve.predicted, "line"))
    series = (
        (curve.uniform, f"uniform, {curve.predicted_as}", "uniform", False),
        (curve.measured_uniform, "uniform, measured, plain rounding", "uniform", True),
        (chosen, curve.predicted_as, "chosen", False),
        (curve.measured, "measured on held-out text", "chosen", True),
    )
    for members, meaning, ink, is_measured in series:
        shapes += plot.dots(members, meaning, ink, is_measured=is_measured)
    shapes += plot.labels(curve.measured, "chosen")
    shapes += plot.labels(chosen, "chosen")
    shapes += plot.labels(curve.measured_uniform, "muted")
    shapes += plot.labels(curve.uniform, "muted")
    return Scene(
        title="Bits against divergence",
        subtitle=f"Lower is better. KL(reference | model) in nats per token, log scale. {curve.note}".strip(),
        width=_WIDTH,
        height=_HEIGHT,
        shapes=(*shapes, *legend),
    )


class _Plot:
    """Places values on the page and remembers what is taken."""

    def __init__(self, x_axis: LinearAxis, y_axis: LogAxis) -> None:
        self._x, self._y = x_axis, y_axis
        self.taken: list[Box] = []

    def place(self, bpw: float, divergence: float) -> tuple[float, float]:
        """Position on the page."""
        x = _LEFT + self._x.fraction(bpw) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (1 - self._y.fraction(divergence)) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 2), round(y, 2)

    def axes(self) -> list[Shape]:
        """Grid lines with their numbers, and the axis titles."""
        floor = _HEIGHT - _BOTTOM
        shapes: list[Shape] = []
        for tick in self._y.ticks(8):
            y = self.place(self._x.low, tick)[1]
            shapes.append(Line(x1=_LEFT, y1=y, x2=_WIDTH - _RIGHT, y2=y, ink="grid"))
            shapes.append(
                Text(x=_LEFT - 8, y=y + 4, text=tick_text(tick), ink="muted", size=12, anchor="end")
            )
        for tick in self._x.ticks(16):
            x = self.place(tick, self._y.low)[0]
            shapes.append(Line(x1=x, y1=floor, x2=x, y2=floor + 5, ink="muted"))
            shapes.append(
                Text(x=x, y=floor + 20, text=tick_text(tick), ink="muted", size=12, anchor="middle")
            )
        shapes.append(Line(x1=_LEFT, y1=floor, x2=_WIDTH - _RIGHT, y2=floor, ink="muted"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        title = "stored bits per weight, everything counted"
        shapes.append(Text(x=middle, y=_HEIGHT - 6, text=title, ink="muted", size=12, anchor="middle"))
        return shapes

    def path(self, points: Sequence[CurvePoint], ink: str) -> Path:
        """A line through points; what it crosses is taken."""
        places = [self.place(point.bpw, point.divergence) for point in points]
        for (x0, y0), (x1, y1) in pairwise(places):
            for step in range(8):
                x, y = x0 + (x1 - x0) * step / 8, y0 + (y1 - y0) * step / 8
                self.taken.append((x - 2, y - 2, x + 2, y + 2))
        return Path(points=tuple(places), ink=ink, width=2.5)

    def dots(self, points: Sequence[CurvePoint], meaning: str, ink: str, *, is_measured: bool) -> list[Shape]:
        """Markers, filled diamonds with 95 % error bars where measured, open circles where predicted."""
        shapes: list[Shape] = []
        for point in points:
            x, y = self.place(point.bpw, point.divergence)
            half = point.half_width
            low, high = (self.place(point.bpw, point.divergence + sign * half)[1] for sign in (-1, 1))
            if half > 0 and point.divergence > half and low - high > 20:
                shapes.append(Line(x1=x, y1=low, x2=x, y2=high, ink=ink, width=1.5))
                shapes += [
                    Line(x1=x - 4, y1=end, x2=x + 4, y2=end, ink=ink, width=1.5) for end in (low, high)
                ]
            tip = f"{point.label} ({meaning})\n{point.bpw:.3f} bits, KL {point.divergence:.4g}".strip()
            radius = 7.0 if ink == "chosen" else 5.5
            dot = Dot(
                x=x, y=y, radius=radius, ink=ink, is_filled=is_measured, is_diamond=is_measured, tip=tip
            )
            shapes.append(dot)
            self.taken.append((x - radius, y - radius, x + radius, y + radius))
        return shapes

    def labels(self, points: Sequence[CurvePoint], ink: str) -> list[Shape]:
        """Names beside their points, wherever there is room."""
        shapes: list[Shape] = []
        for point in points:
            x, y = self.place(point.bpw, point.divergence)
            width = text_width(point.label, _LABEL)
            for dx, dy in _around(width):
                box = (x + dx, y + dy - 10, x + dx + width, y + dy + 3)
                if point.label and _is_inside(box) and not any(_overlap(box, other) for other in self.taken):
                    shapes.append(Text(x=x + dx, y=y + dy, text=point.label, ink=ink, size=_LABEL))
                    self.taken.append(box)
                    break
        return shapes


def _legend(curve: Curve) -> tuple[list[Shape], Box]:
    """What the marks mean, in the upper right where the curve is far away; with the place it takes."""
    entries = _legend_entries(curve)
    width = max((text_width(text, 12) for _, text in entries), default=0) + 44
    x, y = _WIDTH - _RIGHT - width - 8, _TOP + 8
    height = 20 * len(entries) + 12
    shapes: list[Shape] = [Rect(x=x, y=y, width=width, height=height, fill="panel", radius=6)]
    for index, (mark, text) in enumerate(entries):
        middle = y + 16 + 20 * index
        if mark is None:
            shapes.append(Line(x1=x + 10, y1=middle, x2=x + 30, y2=middle, ink="line", width=2.5))
        else:
            shapes.append(replace(mark, x=x + 20, y=middle))
        shapes.append(Text(x=x + 38, y=middle + 4, text=text, size=12))
    return shapes, (x, y, x + width, y + height)


def _legend_entries(curve: Curve) -> list[tuple[Dot | None, str]]:
    """Mark (None: the line) and its meaning."""
    entries: list[tuple[Dot | None, str]] = []
    if len(curve.predicted) > 1:
        entries.append((None, f"best at each budget, {curve.predicted_as}"))
    if curve.chosen:
        text = f"chosen, {curve.predicted_as}: {curve.chosen.divergence:.3g} at {curve.chosen.bpw:.3f}"
        entries.append((Dot(x=0, y=0, radius=6, ink="chosen", is_filled=False), text))
    if curve.measured:
        first = curve.measured[0]
        text = f"measured on held-out text: {first.divergence:.3g} at {first.bpw:.3f}"
        entries.append((Dot(x=0, y=0, radius=6, ink="chosen", is_diamond=True), text))
    if curve.uniform:
        mark = Dot(x=0, y=0, radius=5, ink="uniform", is_filled=False)
        entries.append((mark, f"uniform, {curve.predicted_as}"))
    if curve.measured_uniform:
        mark = Dot(x=0, y=0, radius=5, ink="uniform", is_diamond=True)
        entries.append((mark, "uniform, measured, plain rounding"))
    return entries


def _around(width: float) -> tuple[tuple[float, float], ...]:
    """Offsets of a label's left end and baseline from its point, the best place first."""
    half = width / 2
    return (11, 4), (-11 - width, 4), (-half, -12), (-half, 22), (9, -10), (-9 - width, 18)


def _is_inside(box: Box) -> bool:
    is_between = box[0] > _LEFT and box[2] < _WIDTH - _RIGHT
    return is_between and box[1] > _TOP and box[3] < _HEIGHT - _BOTTOM


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
