"""An adapter's ranks as a map: a row for each module, a column for each block; alone and compared."""

import re
from collections.abc import Callable, Iterable, Mapping

from rich.style import Style
from rich.text import Text

from mlx_optiq_ext.types.palette import bits_color, ink_on, ramp_color
from mlx_optiq_ext.types.status import AdapterStatus

__all__ = ["rank_by_bits_map", "rank_difference_map", "rank_map", "rank_words"]

_BLOCK = re.compile(r"\.(\d+)\.")


def rank_map(ranks: Mapping[str, int], width: int) -> Text:
    """Draw ranks by module and block, brighter where there is more rank, in bands where blocks do not fit.

    Args:
        ranks: By dotted path, such as ``model.layers.3.self_attn.q_proj``.
        width: Columns.
    Returns:
        Lines; the number in every cell where there is room for it.
    """
    most = max(ranks.values(), default=1)
    text = _grid(ranks, width, lambda path: (str(ranks[path]), ramp_color(ranks[path] / most)))
    return text.append(_legend(ranks.values(), most)) if ranks else text


def rank_words(adapter: AdapterStatus) -> str:
    """The ranks of an adapter: one, or from the least to the largest."""
    least = min(adapter.ranks.values(), default=adapter.rank)
    return str(adapter.rank) if least == adapter.rank else f"{least}-{adapter.rank}"


def rank_by_bits_map(ranks: Mapping[str, int], bits: Mapping[str, int], width: int) -> Text:
    """The same ranks, coloured by the bits of the layers under them; below, what each width got.

    Args:
        ranks: By dotted path.
        bits: Of the base's layers by the same paths; 16 where it is not quantized.
        width: Columns.
    """
    text = _grid(ranks, width, lambda path: (str(ranks[path]), bits_color(bits.get(path, 16))))
    of_width: dict[int, list[int]] = {}
    for path, rank in ranks.items():
        of_width.setdefault(bits.get(path, 16), []).append(rank)
    for each, found in sorted(of_width.items()):
        color = bits_color(each)
        text.append(f" {each} ", Style(color=ink_on(color), bgcolor=color))
        mean = sum(found) / len(found)
        modules = "1 module" if len(found) == 1 else f"{len(found)} modules"
        text.append(f" bits: {modules}, rank {min(found)} to {max(found)}, mean {mean:.1f}\n")
    return text


def rank_difference_map(ranks: Mapping[str, int], other: Mapping[str, int], width: int) -> Text:
    """How much more rank one adapter has than another, signed, brighter where they differ more.

    Args:
        ranks: Of the one, by dotted path.
        other: Of the other; a path that only one has counts 0 for the other.
        width: Columns.
    """
    paths = {**dict.fromkeys(other), **dict.fromkeys(ranks)}
    more = {path: ranks.get(path, 0) - other.get(path, 0) for path in paths}
    most = max((abs(each) for each in more.values()), default=0) or 1

    def draw(path: str) -> tuple[str, str]:
        return f"{more[path]:+d}" if more[path] else "·", ramp_color(abs(more[path]) / most)

    text = _grid(more, width, draw)
    wider = sum(each > 0 for each in more.values())
    narrower = sum(each < 0 for each in more.values())
    return text.append(
        f"more rank in {wider}, less in {narrower}, the same in {len(more) - wider - narrower}"
    )


def _grid(ranks: Mapping[str, int], width: int, draw: Callable[[str], tuple[str, str]]) -> Text:
    """Cells by module and block; ``draw`` gives the characters of a path's cell and its colour."""
    grid: dict[str, dict[int, str]] = {}
    for path in ranks:
        found = _BLOCK.search(path)
        module = path[found.end() :] if found else path
        grid.setdefault(module, {})[int(found[1]) if found else 0] = path
    if not grid:
        return Text("no ranks", "dim")
    label = min(max(map(len, grid)), width // 3)
    longest = max(len(draw(path)[0]) for path in ranks)
    blocks = sorted({block for row in grid.values() for block in row})
    cell = next((cell for cell in (max(longest + 1, 3), 3, 2) if len(blocks) * cell <= width - label - 1), 1)
    per_band = max((width - label - 1) // cell, 1)
    text = Text(no_wrap=True)
    for start in range(0, len(blocks), per_band):
        band = blocks[start : start + per_band]
        text.append(f"{'block':<{label}} {_numbers(band, cell)}\n", "dim")
        for module, row in grid.items():
            text.append(f"{module[-label:]:<{label}} ")
            for block in band:
                text.append(*(_cell(*draw(row[block]), cell) if block in row else (" " * cell, "")))
            text.append("\n")
    return text


def _cell(shown: str, color: str, cell: int) -> tuple[str, Style]:
    fits = len(shown) <= cell and cell > 1
    return (shown if fits else "").rjust(cell), Style(color=ink_on(color), bgcolor=color)


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
