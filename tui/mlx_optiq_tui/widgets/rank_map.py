"""An adapter's ranks as a map: a row for each module, a column for each block."""

import re
from collections.abc import Iterable, Mapping

from rich.style import Style
from rich.text import Text

from mlx_optiq_ext.types.palette import ink_on, ramp_color

__all__ = ["rank_map"]

_BLOCK = re.compile(r"\.(\d+)\.")


def rank_map(ranks: Mapping[str, int], width: int) -> Text:
    """Draw ranks by module and block, brighter where there is more rank, in bands where blocks do not fit.

    Args:
        ranks: By dotted path, such as ``model.layers.3.self_attn.q_proj``.
        width: Columns.
    Returns:
        Lines; the number in every cell where there is room for it.
    """
    grid: dict[str, dict[int, int]] = {}
    for path, rank in ranks.items():
        found = _BLOCK.search(path)
        module = path[found.end() :] if found else path
        grid.setdefault(module, {})[int(found[1]) if found else 0] = rank
    if not grid:
        return Text("no ranks", "dim")
    most = max(ranks.values())
    label = min(max(map(len, grid)), width // 3)
    blocks = sorted({block for row in grid.values() for block in row})
    cell = next((cell for cell in (3, 2) if len(blocks) * cell <= width - label - 1), 1)
    per_band = max((width - label - 1) // cell, 1)
    text = Text(no_wrap=True)
    for start in range(0, len(blocks), per_band):
        band = blocks[start : start + per_band]
        text.append(f"{'block':<{label}} {_numbers(band, cell)}\n", "dim")
        for module, row in grid.items():
            text.append(f"{module[-label:]:<{label}} ")
            for block in band:
                text.append(*_cell(row.get(block), most, cell))
            text.append("\n")
    return text.append(_legend(ranks.values(), most))


def _cell(rank: int | None, most: int, cell: int) -> tuple[str, Style | str]:
    if rank is None:
        return " " * cell, ""
    color = ramp_color(rank / most)
    shown = f"{rank:>{cell}}" if cell > 1 and rank < 10**cell else " " * cell
    return shown, Style(color=ink_on(color), bgcolor=color)


def _numbers(blocks: list[int], cell: int) -> str:
    """Every fifth or tenth block's number, over its column."""
    step, line = (5 if cell > 1 else 10), ""
    for place, block in enumerate(blocks):
        if block % step == 0 and len(line) <= place * cell:
            line = line.ljust(place * cell) + (f"{block:>{cell}}" if cell > 1 else str(block))
    return line


def _legend(ranks: Iterable[int], most: int) -> Text:
    """The ranks that occur, at most the three smallest and the three largest of them."""
    values = sorted(set(ranks))
    text = Text("rank ", "dim")
    for rank in values if len(values) <= 6 else (*values[:3], *values[-3:]):
        color = ramp_color(rank / most)
        text.append(f" {rank} ", Style(color=ink_on(color), bgcolor=color))
    return text
