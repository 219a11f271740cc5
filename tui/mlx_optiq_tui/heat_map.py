"""Heat maps of blocks × modules on a terminal: by bits, and by sensitivity.

One row per module, one column per block; models with more blocks than fit are drawn in bands.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from mlx_optiq_ext.types.axis import LogAxis, tick_text
from mlx_optiq_ext.types.palette import bits_color, ink_on, ramp_color
from mlx_optiq_ext.types.report import HeatCell, HeatMap
from mlx_optiq_tui.ansi import Style, paint
from mlx_optiq_tui.table import wrapped

__all__ = ["draw_bits_map", "draw_sensitivity_map"]

_SHADES = "·░▒▓█"
_MOST_LABEL = 24
_MOST_CELL = 3
_MOST_OUTSIDE = 8
_RAMP_CELLS = 20

Drawn = Callable[[HeatCell, int], str]


def draw_bits_map(heat: HeatMap, style: Style, marked: Collection[str] = ()) -> str:
    """Heat map coloured by chosen bits, with the digit in every cell and a legend.

    Args:
        heat: The grid.
        style: Colours and width.
        marked: Paths under a cursor: in brackets where there is room, with their two colours exchanged.
    Returns:
        Lines without a trailing newline; empty where nothing was chosen.
    """
    shown = [cell for cell in (*heat.cells, *heat.outside) if cell.bits is not None]
    if not shown:
        return ""

    def draw(cell: HeatCell, width: int) -> str:
        return _bits_cell(cell, width, style, is_marked=cell.path in marked)

    lines = [paint("Bits by block and module", style, bold=True)]
    lines += _grid(heat, style, draw, lambda cell: cell.choice)
    legend = []
    counts = Counter((cell.bits or 0, cell.choice) for cell in shown)
    for (bits, choice), count in sorted(counts.items()):
        swatch = paint(f" {_digit(bits)} ", style, ink=ink_on(bits_color(bits)), on=bits_color(bits))
        legend.append((swatch + f" {choice} ×{count}", 3 + len(f" {choice} ×{count}")))
    if any(cell.pinned for cell in shown):
        legend.append(("* pinned", 8))
    return "\n".join([*lines, *_flow(legend, style.width)])


def draw_sensitivity_map(heat: HeatMap, style: Style) -> str:
    """Heat map coloured by sensitivity on a logarithmic scale, with the scale below.

    Args:
        heat: The grid.
        style: Colours and width.
    Returns:
        Lines without a trailing newline; empty where nothing was measured.
    """
    values = [c.sensitivity for c in (*heat.cells, *heat.outside) if c.sensitivity is not None]
    axis = LogAxis.around(values, most_decades=5)
    if axis is None:
        return ""

    def draw(cell: HeatCell, width: int) -> str:
        if cell.sensitivity is None:
            return " " * width
        return _ramp(axis.fraction(cell.sensitivity), width, style)

    title = heat.title or f"Sensitivity: KL with only this module at {heat.probe}, nats/token"
    lines = [paint(line, style, bold=True) for line in wrapped(title, style.width)]
    lines += _grid(
        heat, style, draw, lambda cell: "" if cell.sensitivity is None else tick_text(cell.sensitivity)
    )
    bar = "".join(_ramp((i + 0.5) / _RAMP_CELLS, 1, style) for i in range(_RAMP_CELLS))
    middle = tick_text((axis.low * axis.high) ** 0.5)
    lines.append(f"{tick_text(axis.low)} {bar} {tick_text(axis.high)} (log, middle {middle})")
    return "\n".join(lines)


def _grid(heat: HeatMap, style: Style, draw: Drawn, value: Callable[[HeatCell], str]) -> list[str]:
    """The bands, one below the other, and the strip of modules outside of blocks."""
    names = [*heat.labels, *(cell.path for cell in heat.outside)]
    label_width = min(max((len(name) for name in names), default=0), max(_MOST_LABEL, style.width // 3))
    room = max(style.width - label_width - 1, 1)
    at = {(cell.row, cell.block): cell for cell in heat.cells}
    cell_width = max(min(room // max(len(heat.blocks), 1), _MOST_CELL), 1)
    num_bands = -(-len(heat.blocks) * cell_width // room) if heat.blocks else 0
    per_band = -(-len(heat.blocks) // num_bands) if num_bands else 0
    lines: list[str] = []
    for start in range(0, len(heat.blocks), max(per_band, 1)):
        blocks = heat.blocks[start : start + per_band]
        lines.append(_block_numbers(blocks, cell_width, label_width, style))
        for row, label in enumerate(heat.labels):
            cells = (at.get((row, block)) for block in blocks)
            drawn = "".join(" " * cell_width if cell is None else draw(cell, cell_width) for cell in cells)
            lines.append(f"{_cut(label, label_width):<{label_width}} {drawn}")
    lines += [
        f"{_cut(cell.path, label_width):<{label_width}} {draw(cell, 3)} {value(cell)}".rstrip()
        for cell in heat.outside[:_MOST_OUTSIDE]
    ]
    if len(heat.outside) > _MOST_OUTSIDE:
        lines.append(f"and {len(heat.outside) - _MOST_OUTSIDE} more outside of blocks")
    return lines


def _block_numbers(blocks: Sequence[int], cell_width: int, label_width: int, style: Style) -> str:
    """Numbers above the columns, every fifth or tenth block, each ending over its column."""
    line = [" "] * (len(blocks) * cell_width)
    step = 5 if cell_width > 1 else 10
    for index, block in enumerate(blocks):
        text = str(block)
        start = index * cell_width + max(cell_width - 2, 0) // 2 + (cell_width > 1) * (len(text) == 1)
        end = start + len(text)
        if (
            (block % step == 0 or index == 0)
            and end <= len(line)
            and not "".join(line[max(start - 1, 0) : end]).strip()
        ):
            line[start:end] = text
    return paint(f"{'block':<{label_width}} {''.join(line)}".rstrip(), style, dim=True)


def _bits_cell(cell: HeatCell, width: int, style: Style, *, is_marked: bool) -> str:
    if cell.bits is None:
        return " " * width
    text = _digit(cell.bits)
    color = bits_color(cell.bits)
    ink, on = ink_on(color), color
    if is_marked:
        ink, on = on, ink
        text = f"[{text}]"[3 - max(width, 2) :] if width > 1 else text
    elif width > 1:
        text = f"{text}*" if cell.pinned else f" {text}"
    return paint(text.ljust(width) if width < 3 else f"{text:^{width}}", style, ink=ink, on=on)


def _digit(bits: int) -> str:
    return str(bits) if bits < 10 else "F"


def _ramp(fraction: float, width: int, style: Style) -> str:
    if style.colors == "none":
        return _SHADES[min(int(fraction * len(_SHADES)), len(_SHADES) - 1)] * width
    return paint(" " * width, style, on=ramp_color(fraction))


def _flow(items: Sequence[tuple[str, int]], width: int) -> list[str]:
    """Place items of known width side by side, starting a new line where the next does not fit."""
    lines, line, used = [], "", 0
    for text, length in items:
        if used and used + 3 + length > width:
            lines.append(line)
            line, used = "", 0
        line, used = (f"{line}   {text}", used + 3 + length) if used else (text, length)
    return [*lines, line]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
