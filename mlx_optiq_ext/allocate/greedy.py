"""The greedy ascent: start from the cheapest choices, buy the steepest drop per cost while it fits.

Kept for comparison and as a plain rule one can follow by hand. Called by ``budget``.
"""

import heapq

import numpy as np

from mlx_optiq_ext.allocate.problem import Ints, Problem

__all__ = ["ascend"]


def ascend(problem: Problem, budget: int) -> Ints:
    """Upgrade the item with the largest objective drop per cost again and again, skipping what does not fit.

    Returns:
        One column per item, within the budget.
    """
    picks = np.zeros(len(problem.count), dtype=np.int64)
    slack = budget - problem.cost_of(picks)
    queue: list[tuple[float, int, int]] = []
    for item in range(len(picks)):
        _offer(queue, problem, item, 0)
    while queue:
        _, item, column = heapq.heappop(queue)
        cost = int(problem.costs[item, column] - problem.costs[item, picks[item]])
        if cost > slack:
            # A shorter step of the same item may still fit.
            _offer(queue, problem, item, int(picks[item]), below=column)
            continue
        slack -= cost
        picks[item] = column
        _offer(queue, problem, item, column)
    return picks


def _offer(
    queue: list[tuple[float, int, int]], problem: Problem, item: int, column: int, below: int | None = None
) -> None:
    """Queue the steepest upgrade of ``item`` from ``column``, among those left of ``below``."""
    last = int(problem.count[item]) if below is None else below
    if column + 1 >= last:
        return
    gain = problem.objective[item, column] - problem.objective[item, column + 1 : last]
    cost = problem.costs[item, column + 1 : last] - problem.costs[item, column]
    rate = gain / cost
    best = int(np.argmax(rate))
    heapq.heappush(queue, (-float(rate[best]), item, column + 1 + best))
