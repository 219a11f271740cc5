"""Bits against divergence on a terminal: a line of braille dots with the points marked on it."""

from collections.abc import Sequence
from itertools import pairwise

from mlx_optiq_ext.types.axis import LinearAxis, LogAxis, tick_text
from mlx_optiq_ext.types.palette import bits_color
from mlx_optiq_ext.types.report import Curve, CurvePoint
from mlx_optiq_tui.ansi import Style, paint
from mlx_optiq_tui.table import wrapped

__all__ = ["draw_curve"]

_HEIGHT = 16
_LABEL_WIDTH = 8
_LINE, _UNIFORM, _CHOSEN, _MEASURED = bits_color(4), "#8a8f98", "#fb9b06", "#ed6925"
# Dot numbers of a braille cell, by row and column. Source: Unicode Standard, block U+2800.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw_curve(curve: Curve, style: Style, height: int = _HEIGHT) -> str:
    """Draw bits (to the right) against divergence (upward, logarithmic).

    Args:
        curve: Predicted line, chosen point, uniform and measured points.
        style: Colours and width.
        height: Lines of the plot itself, without title, axis and legend.
    Returns:
        Lines without a trailing newline; empty where there is no point with positive divergence.
    """
    chosen = (curve.chosen,) if curve.chosen else ()
    points = (*curve.predicted, *curve.uniform, *chosen, *curve.measured, *curve.measured_uniform)
    y_axis = LogAxis.around([p.divergence for p in points], margin=1.25)
    if y_axis is None:
        return ""
    x_axis = LinearAxis(low=min(p.bpw for p in points) - 0.25, high=max(p.bpw for p in points) + 0.75)
    plot = _Plot(x_axis, y_axis, style.width - _LABEL_WIDTH - 2, height, style)
    plot.line(curve.predicted, _LINE)
    plot.markers(curve.uniform, "○", _UNIFORM)
    plot.markers(curve.measured_uniform, "◇", _UNIFORM)
    plot.markers(chosen, "●", _CHOSEN)
    plot.markers(curve.measured, "◆", _MEASURED)
    title = paint("Bits against divergence (KL, nats/token, log scale)", style, bold=True)
    note = [paint(line, style, dim=True) for line in wrapped(curve.note, style.width)]
    return "\n".join([title, *plot.lines(), *_legend(curve, style), *note])


class _Plot:
    """A grid of characters with braille lines below and markers above."""

    def __init__(self, x_axis: LinearAxis, y_axis: LogAxis, width: int, height: int, style: Style) -> None:
        self._x, self._y, self._style = x_axis, y_axis, style
        self._width, self._height = width, height
        self._dots = [[0] * width for _ in range(height)]
        self._text: list[list[tuple[str, str]]] = [[("", "")] * width for _ in range(height)]
        self._line_color = ""

    def line(self, points: Sequence[CurvePoint], color: str) -> None:
        """Join points by straight lines."""
        self._line_color = color
        places = [self._place(point, 2, 4) for point in points]
        for (x0, y0), (x1, y1) in pairwise(places):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for step in range(steps + 1):
                x, y = round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)
                self._dots[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    def markers(self, points: Sequence[CurvePoint], mark: str, color: str) -> None:
        """Mark points, each with its label where there is room."""
        for point in points:
            column, row = self._place(point, 1, 1)
            self._text[row][column] = (mark, color)
        for point in points:
            if point.label:
                self._label(point, color)

    def _label(self, point: CurvePoint, color: str) -> None:
        """Write a label right of, left of, above or below its marker, wherever nothing is in the way."""
        column, row = self._place(point, 1, 1)
        length = len(point.label)
        right, left, middle = column + 2, column - 1 - length, column - length // 2
        for start, at in (
            (right, row),
            (left, row),
            (right, row - 1),
            (left, row + 1),
            (middle, row - 1),
            (middle, row + 1),
        ):
            end = start + length
            if start < 0 or end > self._width or not 0 <= at < self._height:
                continue
            near = slice(max(start - 1, 0), end + 1)
            taken = [text for text, _ in self._text[at][near] if text and text != self._text[row][column][0]]
            if not taken and not any(self._dots[at][near]):
                self._text[at][start:end] = [(letter, color) for letter in point.label]
                return

    def lines(self) -> list[str]:
        """The plot with its axes."""
        names = {}
        for tick in self._y.ticks(6):
            names[round((1 - self._y.fraction(tick)) * (self._height - 1))] = tick_text(tick)
        drawn = []
        for row in range(self._height):
            axis = "┤" if row in names else "│"
            label = paint(f"{names.get(row, ''):>{_LABEL_WIDTH}} {axis}", self._style, dim=True)
            drawn.append(label + self._row(row))
        rule, numbers = ["─"] * self._width, [" "] * (self._width + 4)
        for tick in self._x.ticks(10):
            column = round(self._x.fraction(tick) * (self._width - 1))
            rule[column] = "┬"
            text = tick_text(tick)
            start = max(column - len(text) // 2, 0)
            numbers[start : start + len(text)] = text
        pad = " " * (_LABEL_WIDTH + 1)
        foot = "stored bits per weight"
        return [
            *drawn,
            paint(f"{pad}└{''.join(rule)}", self._style, dim=True),
            paint(f"{pad} {''.join(numbers)}".rstrip(), self._style, dim=True),
            paint(f"{pad} {foot:^{self._width}}".rstrip(), self._style, dim=True),
        ]

    def _row(self, row: int) -> str:
        cells = []
        for (text, color), dots in zip(self._text[row], self._dots[row], strict=True):
            if text:
                cells.append(paint(text, self._style, ink=color, bold=True))
            elif dots:
                cells.append(paint(chr(0x2800 + dots), self._style, ink=self._line_color))
            else:
                cells.append(" ")
        return "".join(cells).rstrip()

    def _place(self, point: CurvePoint, per_column: int, per_row: int) -> tuple[int, int]:
        x = self._x.fraction(point.bpw) * (self._width * per_column - 1)
        y = (1 - self._y.fraction(point.divergence)) * (self._height * per_row - 1)
        return round(x), round(y)


def _legend(curve: Curve, style: Style) -> list[str]:
    entries = []
    if curve.predicted:
        entries.append((paint("⠒⠒", style, ink=_LINE), f"best at each budget, {curve.predicted_as}"))
    if curve.chosen:
        text = f"chosen, {curve.predicted_as} ({curve.chosen.bpw:.3f}: {curve.chosen.divergence:.3g})"
        entries.append((paint(" ●", style, ink=_CHOSEN, bold=True), text))
    if curve.uniform:
        entries.append((paint(" ○", style, ink=_UNIFORM, bold=True), f"uniform, {curve.predicted_as}"))
    if curve.measured:
        first = curve.measured[0]
        half = f" ± {first.half_width:.2g}" if first.half_width > 0 else ""
        text = f"measured, held-out ({first.bpw:.3f}: {first.divergence:.3g}{half})"
        entries.append((paint(" ◆", style, ink=_MEASURED, bold=True), text))
    if curve.measured_uniform:
        entries.append((paint(" ◇", style, ink=_UNIFORM, bold=True), "uniform, measured, plain rounding"))
    return [f"  {mark} {text}" for mark, text in entries]
