"""Heat maps of blocks × modules as shapes: by bits, and by sensitivity."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from mlx_optiq_ext.quant.picture import Rect, Scene, Shape, Text, text_width
from mlx_optiq_ext.types.axis import LogAxis, tick_text
from mlx_optiq_ext.types.palette import bits_color, ink_on, ramp_color
from mlx_optiq_ext.types.report import HeatCell, HeatMap

__all__ = ["bits_scene", "sensitivity_scene"]

_PAGE_WIDTH = 960.0
_TOP = 20.0
_SIDE = 64.0
_GAP = 1.0
_OUTSIDE_HEIGHT = 22.0
_MOST_OUTSIDE = 12
_NARROWEST, _WIDEST = 9.0, 44.0


class _Look(NamedTuple):
    """How one cell is drawn, and what is written beside its row."""

    fill: Callable[[HeatCell], str]
    mark: Callable[[HeatCell], str]
    value: Callable[[HeatCell], str]
    side_title: str
    side: Callable[[list[HeatCell]], str]


def bits_scene(heat: HeatMap) -> Scene | None:
    """Heat map coloured by chosen bits; None where nothing was chosen."""
    shown = [cell for cell in (*heat.cells, *heat.outside) if cell.bits is not None]
    if not shown:
        return None
    look = _Look(
        fill=lambda cell: "empty" if cell.bits is None else bits_color(cell.bits),
        mark=lambda cell: "" if cell.bits is None else str(cell.bits) if cell.bits < 10 else "F",
        value=lambda cell: cell.choice + (", pinned" if cell.pinned else ""),
        side_title="mean bits",
        side=_mean_bits,
    )
    shapes, width, bottom = _grid(heat, look)
    legend, height = _bits_legend(shown, width, bottom)
    return Scene(
        title="Bits by block and module",
        subtitle="Columns are blocks, rows are modules; digits are the bits of a code, F is left as it is.",
        width=width,
        height=height,
        shapes=(*shapes, *legend),
    )


def sensitivity_scene(heat: HeatMap) -> Scene | None:
    """Heat map coloured by sensitivity, logarithmically; None where nothing was measured."""
    values = [c.sensitivity for c in (*heat.cells, *heat.outside) if c.sensitivity is not None]
    axis = LogAxis.around(values, most_decades=5)
    if axis is None:
        return None

    def fill(cell: HeatCell) -> str:
        return "empty" if cell.sensitivity is None else ramp_color(axis.fraction(cell.sensitivity))

    look = _Look(
        fill=fill,
        mark=lambda _: "",
        value=lambda cell: "" if cell.sensitivity is None else f"{tick_text(cell.sensitivity)} nats/token",
        side_title="sum",
        side=lambda cells: tick_text(sum(c.sensitivity or 0.0 for c in cells)),
    )
    shapes, width, bottom = _grid(heat, look)
    return Scene(
        title="Sensitivity by block and module",
        subtitle=f"Divergence (KL, nats per token) with this module alone stored as {heat.probe}; log scale.",
        width=width,
        height=bottom + 52,
        shapes=(*shapes, *_ramp_legend(axis, width, bottom)),
    )


def _grid(heat: HeatMap, look: _Look) -> tuple[list[Shape], float, float]:
    """Cells, labels and the strip of modules outside; with the width used and the lower edge."""
    outside = heat.outside[:_MOST_OUTSIDE]
    names = [*heat.labels, *(cell.path for cell in outside)]
    left = max((text_width(name, 12) for name in names), default=0.0) + 12
    columns = max(len(heat.blocks), 1)
    cell_width = min(max((_PAGE_WIDTH - left - _SIDE) / columns, _NARROWEST), _WIDEST)
    cell_height = 22.0 if cell_width >= 16 else 19.0
    column_of = {block: index for index, block in enumerate(heat.blocks)}
    shapes: list[Shape] = _column_numbers(heat, left, cell_width)
    right = left + columns * cell_width
    if heat.blocks:
        shapes.append(Text(x=left - 8, y=_TOP - 6, text="block", ink="muted", size=11, anchor="end"))
        shapes.append(
            Text(x=right + _SIDE, y=_TOP - 6, text=look.side_title, ink="muted", size=11, anchor="end")
        )
    for row, label in enumerate(heat.labels):
        middle = _TOP + row * cell_height + cell_height / 2
        members = [cell for cell in heat.cells if cell.row == row]
        shapes.append(Text(x=left - 8, y=middle + 4, text=label, size=12, anchor="end"))
        side = look.side(members)
        shapes.append(Text(x=right + _SIDE, y=middle + 4, text=side, ink="muted", size=12, anchor="end"))
        for cell in members:
            x = left + column_of[cell.block or 0] * cell_width
            shapes += _cell(cell, look, x, middle - cell_height / 2, cell_width, cell_height)
    bottom = _TOP + len(heat.labels) * cell_height + (10 if outside and heat.labels else 0)
    for cell in outside:
        shapes.append(Text(x=left - 8, y=bottom + 15, text=cell.path, size=12, anchor="end"))
        shapes += _cell(cell, look, left, bottom, max(cell_width, 30), _OUTSIDE_HEIGHT)
        beside = ", ".join(word for word in (look.value(cell), _weights(cell.numel)) if word)
        shapes.append(
            Text(x=left + max(cell_width, 30) + 8, y=bottom + 15, text=beside, ink="muted", size=12)
        )
        bottom += _OUTSIDE_HEIGHT
    if len(heat.outside) > _MOST_OUTSIDE:
        more = f"and {len(heat.outside) - _MOST_OUTSIDE} more outside of blocks"
        shapes.append(Text(x=left, y=bottom + 15, text=more, ink="muted", size=12))
        bottom += _OUTSIDE_HEIGHT
    return shapes, max(right + _SIDE, _PAGE_WIDTH), bottom


def _cell(cell: HeatCell, look: _Look, x: float, y: float, width: float, height: float) -> list[Shape]:
    fill = look.fill(cell)
    radius = 2.0 if width >= 14 else 1.0
    drawn: list[Shape] = [
        Rect(
            x=x,
            y=y,
            width=width - _GAP,
            height=height - _GAP,
            fill=fill,
            radius=radius,
            tip=_tip(cell),
        )
    ]
    mark = look.mark(cell)
    if mark:
        ink = ink_on(fill)
        size = 12.0 if width >= 14 else 9.0
        middle = x + (width - _GAP) / 2
        drawn.append(
            Text(x=middle, y=y + height / 2 + size * 0.34, text=mark, ink=ink, size=size, anchor="middle")
        )
        if cell.pinned:
            drawn.append(Rect(x=middle - 4, y=y + height - 4, width=8, height=1.5, fill=ink))
    return drawn


def _tip(cell: HeatCell) -> str:
    parts = [cell.path]
    if cell.choice:
        parts.append(cell.choice + (" (pinned)" if cell.pinned else ""))
    if cell.numel:
        parts.append(_weights(cell.numel))
    if cell.sensitivity is not None:
        parts.append(f"sensitivity {cell.sensitivity:.3g}")
    if cell.divergence is not None:
        parts.append(f"predicted KL as stored {cell.divergence:.3g}")
    return "\n".join(parts)


def _column_numbers(heat: HeatMap, left: float, cell_width: float) -> list[Shape]:
    step = 1 if cell_width >= 24 else 5 if len(heat.blocks) <= 60 else 10
    return [
        Text(
            x=left + index * cell_width + (cell_width - _GAP) / 2,
            y=_TOP - 6,
            text=str(block),
            ink="muted",
            size=11,
            anchor="middle",
        )
        for index, block in enumerate(heat.blocks)
        if block % step == 0
    ]


def _bits_legend(shown: list[HeatCell], width: float, top: float) -> tuple[list[Shape], float]:
    counts = Counter((cell.bits or 0, cell.choice) for cell in shown)
    shapes: list[Shape] = []
    x, y = 0.0, top + 18
    entries = [
        (
            bits_color(bits),
            str(bits) if bits < 10 else "F",
            f"{choice}, {count} modules" if count > 1 else choice,
        )
        for (bits, choice), count in sorted(counts.items())
    ]
    for color, mark, text in entries:
        length = 30 + text_width(text, 12) + 18
        if x + length > width:
            x, y = 0.0, y + 26
        shapes.append(Rect(x=x, y=y, width=24, height=18, fill=color, radius=2))
        shapes.append(Text(x=x + 12, y=y + 13, text=mark, ink=ink_on(color), size=12, anchor="middle"))
        shapes.append(Text(x=x + 30, y=y + 13, text=text, size=12))
        x += length
    if any(cell.pinned for cell in shown):
        if x + 90 > width:
            x, y = 0.0, y + 26
        shapes.append(Rect(x=x + 8, y=y + 14, width=8, height=1.5, fill="text"))
        shapes.append(Text(x=x + 24, y=y + 13, text="pinned", size=12))
    return shapes, y + 26


def _ramp_legend(axis: LogAxis, width: float, top: float) -> list[Shape]:
    steps, bar = 96, min(width - 40, 480.0)
    y = top + 16
    shapes: list[Shape] = [
        Rect(x=i * bar / steps, y=y, width=bar / steps + 0.5, height=12, fill=ramp_color((i + 0.5) / steps))
        for i in range(steps)
    ]
    for tick in axis.ticks(9):
        x = axis.fraction(tick) * bar
        anchor = "start" if x < 12 else "middle"
        shapes.append(Rect(x=min(x, bar - 1), y=y + 12, width=1, height=4, fill="muted"))
        shapes.append(Text(x=x, y=y + 28, text=tick_text(tick), ink="muted", size=11, anchor=anchor))
    shapes.append(Text(x=bar + 14, y=y + 11, text="nats/token", ink="muted", size=11))
    return shapes


def _mean_bits(cells: list[HeatCell]) -> str:
    chosen = [cell for cell in cells if cell.bits is not None]
    weights = [max(cell.numel, 1) for cell in chosen]
    if not chosen:
        return ""
    return f"{sum((c.bits or 0) * w for c, w in zip(chosen, weights, strict=True)) / sum(weights):.2f}"


def _weights(numel: int) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if numel >= scale:
            return f"{numel / scale:.3g} {unit} weights"
    return f"{numel} weights" if numel else ""
