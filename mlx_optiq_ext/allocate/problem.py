"""The question a budget solver answers, as plain data, and its dense form.

Knows nothing of models, bits or files: an item has choices, a choice has a cost and a value. Used for
weights, and for anything else that is bought under a budget.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import UsageError

__all__ = ["Floats", "Ints", "Item", "Problem", "Solution", "build_problem"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: exactly one of its choices is taken."""

    costs: tuple[int, ...]
    """Cost of each choice, in whole units of the budget (stored bits)."""
    values: tuple[float, ...]
    """What is minimised, per choice (divergence)."""
    penalties: tuple[float, ...] = ()
    """Added to ``values``, in their unit, while solving; reported apart (price of bits read); empty: none."""

    def objective(self, choice: int) -> float:
        """Value plus penalty of one choice, in their unit."""
        return self.values[choice] + (self.penalties[choice] if self.penalties else 0.0)


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """One choice per item, within the budget."""

    picks: tuple[int, ...]
    """Index of the chosen choice of each item."""
    cost: int
    value: float
    """Sum of ``values`` of the picks."""
    penalty: float = 0.0
    """Sum of ``penalties`` of the picks."""
    lower_bound: float
    """No picks within the budget have a smaller value + penalty."""
    exact: bool
    """The picks are proven to be the best (to 1e-12 of the sum)."""
    price: float = 0.0
    """Value that one more unit of cost buys around this budget, ≥ 0."""

    @property
    def objective(self) -> float:
        """Value plus penalty: what was minimised, in their unit."""
        return self.value + self.penalty


class Problem(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Items as matrices, with the choices that can be part of a best answer only.

    Row = item, column = choice in strictly ascending cost and strictly descending objective; rows are
    padded on the right with infinite objective and zero cost.
    """

    costs: Ints
    objective: Floats
    """Value plus penalty, shape like ``costs``."""
    original: Ints
    """Index of the choice in its :class:`Item`; -1 in the padding."""
    count: Ints
    """Choices per item, shape (items,)."""

    def cost_of(self, picks: Ints) -> int:
        """Summed cost of one column per item."""
        return int(self.costs[np.arange(len(picks)), picks].sum())

    def objective_of(self, picks: Ints) -> float:
        """Summed objective of one column per item."""
        return float(self.objective[np.arange(len(picks)), picks].sum())


def build_problem(items: Sequence[Item]) -> Problem:
    """Check the items and drop every choice that costs as much as a better one.

    Raises:
        UsageError: An item has no choice, lists of different lengths, a negative cost or a number that is
            not finite.
    """
    rows = [_efficient_choices(index, item) for index, item in enumerate(items)]
    width = max((len(row) for row in rows), default=1)
    costs = np.zeros((len(rows), width), dtype=np.int64)
    objective = np.full((len(rows), width), np.inf)
    original = np.full((len(rows), width), -1, dtype=np.int64)
    for row, kept in enumerate(rows):
        for column, (cost, value, index) in enumerate(kept):
            costs[row, column], objective[row, column], original[row, column] = cost, value, index
    count = np.array([len(row) for row in rows], dtype=np.int64)
    return Problem(costs=costs, objective=objective, original=original, count=count)


def _efficient_choices(position: int, item: Item) -> list[tuple[int, float, int]]:
    """(cost, objective, index) of the choices nothing cheaper or equal beats, in ascending cost."""
    penalties = item.penalties or (0.0,) * len(item.values)
    if not item.costs or not len(item.costs) == len(item.values) == len(penalties):
        raise UsageError(
            f"item {position} has {len(item.costs)} costs, {len(item.values)} values and "
            f"{len(item.penalties)} penalties; one of each per choice is needed, and at least one choice"
        )
    totals = [value + penalty for value, penalty in zip(item.values, penalties, strict=True)]
    if min(item.costs) < 0 or not np.isfinite(totals).all():
        raise UsageError(
            f"item {position} has a negative cost or a value that is not finite; measure it again"
        )
    kept: list[tuple[int, float, int]] = []
    for cost, total, index in sorted(zip(item.costs, totals, range(len(totals)), strict=True)):
        if not kept or total < kept[-1][1]:
            kept.append((cost, total, index))
    return kept
