"""What is wished for besides a budget: choices that are pinned, protected edges; and budgets named otherwise.

Knows the sensitivity table and no widget. Called by the bits pane.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec
from msgspec.structs import replace

from mlx_optiq_ext.allocate.menu import Menu
from mlx_optiq_ext.allocate.size import budget_from
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, Choice, SensitivityTable
from mlx_optiq_tui.quantize.model_facts import ModelFacts

__all__ = ["Wishes", "bpw_of", "pin_patterns"]

_BLOCK = re.compile(r"\.\d+(?=\.)")


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What holds at every budget."""

    pins: Mapping[str, Choice] = {}
    """By path."""
    edges: bool = False
    """Embedding, head, first and last block at the widest choice (``--protect edges``)."""

    def options(self, table: SensitivityTable, bpw: float) -> AllocateOptions:
        """As ``optiq convert`` takes them, with a budget in stored bits per weight."""
        paths = [path for unit in table.units for path in unit.paths]
        return AllocateOptions(
            target_bpw=bpw,
            pin=pin_patterns(self.pins, paths),
            protect="edges" if self.edges else "none",
        )

    def stepped(
        self, menus: Sequence[Menu], allocation: Allocation, paths: Sequence[str], step: int
    ) -> "Wishes":
        """Pin each path to its next choice, wider (1) or narrower (-1) than it is; at an end, to that end.

        Args:
            menus: Of the table.
            allocation: What is, where nothing is pinned.
            paths: Modules; what is stored alike goes with them.
            step: 1 or -1.
        """
        asked = set(paths)
        pins = dict(self.pins)
        for menu in menus:
            here = [path for path in menu.unit.paths if path in asked]
            if not here:
                continue
            offers = sorted(menu.offers, key=lambda offer: offer.bits)
            chosen = self.pins.get(here[0], allocation.bit_map.choices[here[0]])
            at = next((index for index, offer in enumerate(offers) if offer.choice == chosen), 0)
            found = offers[min(max(at + step, 0), len(offers) - 1)].choice
            pins |= dict.fromkeys(menu.unit.paths, found)
        return replace(self, pins=pins)

    def freed(self, table: SensitivityTable, paths: Sequence[str]) -> "Wishes":
        """Leave paths, and what is stored alike, to the budget again."""
        asked = set(paths)
        gone = {path for unit in table.units if asked & set(unit.paths) for path in unit.paths}
        return replace(self, pins={path: choice for path, choice in self.pins.items() if path not in gone})


def pin_patterns(pins: Mapping[str, Choice], paths: Sequence[str]) -> tuple[str, ...]:
    """The fewest words for ``--pin``: a pattern where it matches pinned paths of one choice alone.

    Args:
        pins: By path.
        paths: All that a pattern could match.
    """
    left = dict(pins)
    words = []
    for pattern in _patterns(left):
        matched = [path for path in paths if fnmatchcase(path, pattern)]
        choices = {pins.get(path) for path in matched}
        choice = next(iter(choices)) if len(choices) == 1 else None
        if choice is not None and len(matched) > 1 and any(path in left for path in matched):
            words.append(f"{pattern}={choice.label}")
            left = {path: each for path, each in left.items() if path not in matched}
    words += [f"{glob.escape(path)}={choice.label}" for path, choice in left.items()]
    return tuple(words)


def bpw_of(
    table: SensitivityTable, facts: ModelFacts | None, *, size: str = "", memory: str = "", context: int
) -> float:
    """The budget in stored bits per weight of a checkpoint's size, or of a memory with its KV cache.

    Args:
        table: What was measured.
        facts: Of the model; ``memory`` needs its config.
        size: As ``--target-size`` takes it: ``4.5GB``. Or
        memory: As ``--fit`` takes it.
        context: Tokens in the cache, at least 1.
    Returns:
        Rounded down to a thousandth.
    Raises:
        UsageError: Neither or both, one that cannot be read, no config.
        BudgetInfeasible: Nothing is left for weights.
    """
    cache = facts.cache_nbytes(context) if facts is not None and facts.config else None
    per_token = None if cache is None else -(-cache // context)
    options = AllocateOptions(target_size=size or None, fit=memory or None, context=context)
    bits = budget_from(table, options, kv_bytes_per_token=per_token).bits
    return 1000 * bits // table.total_numel / 1000


def _patterns(paths: Mapping[str, Choice]) -> list[str]:
    """What could be said of several paths at once: a module in all blocks, a whole block."""
    found: dict[str, None] = {}
    for path in paths:
        block = _BLOCK.search(path)
        if block is not None:
            before, after = glob.escape(path[: block.start()]), glob.escape(path[block.end() :])
            found[f"{before}.*{after}"] = None
            found[f"{before}{block.group()}.*"] = None
    return list(found)
