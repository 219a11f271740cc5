"""Loss over updates as shapes: the training loss, and the validation loss with the adapter that was kept.

Knows no file format; ``quant.report_html`` makes SVG of it.
"""

import math
from collections.abc import Sequence

from mlx_optiq_ext.quant.picture import Dot, Line, Path, Scene, Shape, Text
from mlx_optiq_ext.types.axis import LinearAxis, tick_text
from mlx_optiq_ext.types.training import Metric, TrainRecord, ValidationRecord

__all__ = ["loss_scene"]

_WIDTH, _HEIGHT = 960.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 16.0, 34.0, 46.0


def loss_scene(metrics: Sequence[Metric], title: str, unit: str) -> Scene | None:
    """Plot a training; None where nothing was recorded.

    Args:
        metrics: Lines of metrics.jsonl.
        title: Name of what was trained.
        unit: Of the loss: ``nats per token``.
    """
    if not metrics:
        return None
    losses = [metric.loss for metric in metrics]
    margin = 0.05 * (max(losses) - min(losses)) or 0.05 * max(abs(losses[0]), 1.0)
    y_axis = LinearAxis(low=min(losses) - margin, high=max(losses) + margin)
    x_axis = LinearAxis(low=0.0, high=float(max(1, metrics[-1].step)))

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + x_axis.fraction(step) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (1 - y_axis.fraction(loss)) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 2), round(y, 2)

    shapes: list[Shape] = []
    for tick in _round_values(y_axis, 8):
        y = place(0, tick)[1]
        shapes.append(Line(x1=_LEFT, y1=y, x2=_WIDTH - _RIGHT, y2=y, ink="grid"))
        shapes.append(Text(x=_LEFT - 8, y=y + 4, text=tick_text(tick), ink="muted", size=12, anchor="end"))
    floor = _HEIGHT - _BOTTOM
    for tick in _round_values(x_axis, 12):
        x = place(tick, y_axis.low)[0]
        shapes.append(Line(x1=x, y1=floor, x2=x, y2=floor + 5, ink="muted"))
        shapes.append(Text(x=x, y=floor + 20, text=f"{tick:g}", ink="muted", size=12, anchor="middle"))
    shapes.append(Line(x1=_LEFT, y1=floor, x2=_WIDTH - _RIGHT, y2=floor, ink="muted"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    shapes.append(Text(x=middle, y=_HEIGHT - 6, text="updates", ink="muted", size=12, anchor="middle"))
    train = [metric for metric in metrics if isinstance(metric, TrainRecord)]
    valid = [metric for metric in metrics if isinstance(metric, ValidationRecord)]
    for ink, width, points in (("line", 1.5, train), ("chosen", 2.5, valid)):
        if len(points) > 1:
            places = tuple(place(point.step, point.loss) for point in points)
            shapes.append(Path(points=places, ink=ink, width=width))
    shapes += [_dot(place(point.step, point.loss), point) for point in valid]
    shapes += _legend(bool(train), bool(valid))
    return Scene(title=title, subtitle=f"Loss in {unit}", width=_WIDTH, height=_HEIGHT, shapes=tuple(shapes))


def _dot(at: tuple[float, float], record: ValidationRecord) -> Dot:
    tip = f"validation {record.loss:.4f} after {record.step} updates"
    return Dot(x=at[0], y=at[1], radius=5, ink="chosen", is_filled=record.is_best, tip=tip)


def _legend(has_train: bool, has_valid: bool) -> list[Shape]:
    """What the marks mean, above the plot."""
    shapes: list[Shape] = []
    x = _LEFT
    if has_train:
        shapes.append(Line(x1=x, y1=12, x2=x + 24, y2=12, ink="line", width=1.5))
        shapes.append(Text(x=x + 32, y=16, text="training", size=12))
        x += 120
    if has_valid:
        shapes.append(Line(x1=x, y1=12, x2=x + 24, y2=12, ink="chosen", width=2.5))
        shapes.append(Dot(x=x + 12, y=12, radius=5, ink="chosen"))
        shapes.append(Text(x=x + 32, y=16, text="validation, filled where it was the lowest yet", size=12))
    return shapes


def _round_values(axis: LinearAxis, most: int) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten within an axis."""
    power = 10.0 ** math.floor(math.log10((axis.high - axis.low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(index * step, 10) for index in range(first, last + 1)]
