"""The relaxed knapsack: a bound, a price per unit of cost, and picks to start from.

Knows only :class:`~mlx_optiq_ext.allocate.problem.Problem`. Called by ``budget`` and ``close``.
"""

import itertools

import msgspec
import numpy as np

from mlx_optiq_ext.allocate.problem import Floats, Ints, Problem

__all__ = ["Relaxation", "fill_slack", "relax"]


class Relaxation(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Solution of the linear relaxation at one budget."""

    price: float
    """Lagrange multiplier: objective per unit of cost where the budget ends; 0 if it does not bind."""
    picks: Ints
    """Feasible picks, each the best of its item at ``price``."""
    next_picks: Ints
    """``picks`` plus the first upgrade that does not fit; the same where everything fits."""
    bound: float
    """Lower bound of every feasible objective."""
    slack: int
    """Budget left by ``picks``, ≥ 0."""


def relax(problem: Problem, budget: int) -> Relaxation:
    """Solve the linear relaxation exactly.

    The upgrades on the lower convex hull of every item are bought in the order of their gain per cost;
    the first that does not fit gives the price.

    Args:
        budget: At least the sum of the cheapest choices.
    Source: Sinha & Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979).
    """
    item, target, cost, gain = _hull_upgrades(problem)
    slope = gain / cost
    # Steepest first; equal slopes in the order of items, and inside an item from the cheap end.
    order = np.lexsort((target, item, -slope))
    spent = np.cumsum(cost[order])
    slack = budget - problem.cost_of(np.zeros(len(problem.count), dtype=np.int64))
    fitting = int(np.searchsorted(spent, slack, side="right"))
    picks = np.zeros(len(problem.count), dtype=np.int64)
    taken = order[:fitting]
    np.maximum.at(picks, item[taken], target[taken])
    price = float(slope[order[fitting]]) if fitting < len(order) else 0.0
    next_picks = picks.copy()
    if fitting < len(order):
        next_picks[item[order[fitting]]] = target[order[fitting]]
    left = budget - problem.cost_of(picks)
    bound = problem.objective_of(picks) - price * left
    return Relaxation(price=price, picks=picks, next_picks=next_picks, bound=bound, slack=left)


def fill_slack(problem: Problem, picks: Ints, budget: int) -> Ints:
    """Spend what is left (or, above the budget, save what is missing) one best single change at a time.

    Returns:
        Picks within the budget, or above it where no single change of an item can mend that.
    """
    picks = picks.copy()
    rows = np.arange(len(picks))
    real = np.isfinite(problem.objective)
    slack = budget - problem.cost_of(picks)
    while True:
        extra = problem.costs - problem.costs[rows, picks][:, None]
        change = problem.objective - problem.objective[rows, picks][:, None]
        allowed = real & (extra <= slack)
        if slack >= 0:
            allowed &= change < 0
        best = int(np.argmin(np.where(allowed, change, np.inf)))
        row, column = divmod(best, problem.costs.shape[1])
        if not allowed[row, column]:
            return picks
        slack -= int(extra[row, column])
        picks[row] = column


def _hull_upgrades(problem: Problem) -> tuple[Ints, Ints, Ints, Floats]:
    """Steps along the lower convex hull of each item: item, column reached, extra cost, gain (> 0)."""
    steps: list[tuple[int, int, int, float]] = []
    for row, count in enumerate(problem.count):
        costs = problem.costs[row, :count].tolist()
        values = problem.objective[row, :count].tolist()
        hull = [0]
        for column in range(1, int(count)):
            while len(hull) > 1 and _is_above(costs, values, hull[-2], hull[-1], column):
                hull.pop()
            hull.append(column)
        for left, right in itertools.pairwise(hull):
            steps.append((row, right, costs[right] - costs[left], values[left] - values[right]))
    columns = np.array([step[:3] for step in steps], dtype=np.int64).reshape(-1, 3)
    gain = np.array([step[3] for step in steps], dtype=np.float64)
    return columns[:, 0], columns[:, 1], columns[:, 2], gain


def _is_above(costs: list[int], values: list[float], left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    rise_middle = (values[middle] - values[left]) * (costs[right] - costs[left])
    rise_right = (values[right] - values[left]) * (costs[middle] - costs[left])
    return rise_middle >= rise_right
