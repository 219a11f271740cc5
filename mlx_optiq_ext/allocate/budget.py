"""Spend a budget over items with choices: the multiple-choice knapsack.

Knows nothing of models: integer costs, float values to minimise. Deterministic, never above the budget.
Used for weights by ``bitmap``.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mlx_optiq_ext.allocate.close import close_gap
from mlx_optiq_ext.allocate.greedy import ascend
from mlx_optiq_ext.allocate.problem import Ints, Item, Problem, Solution, build_problem
from mlx_optiq_ext.allocate.relax import fill_slack, relax
from mlx_optiq_ext.errors import BudgetInfeasible

__all__ = ["Item", "Solution", "cheapest_cost", "lower_bound", "solve"]


def solve(
    items: Sequence[Item],
    budget: int,
    *,
    solver: Literal["exact", "greedy"] = "exact",
    candidates: Sequence[Sequence[int]] = (),
    max_states: int = 20_000,
) -> Solution:
    """Pick one choice per item so that the summed value + penalty is least within the budget.

    Budget that the best answer leaves unused is spent on choices that cost more at no loss, so the cost
    comes as near to the budget as that allows.

    Args:
        items: Decisions, in any order; the answer has the same order.
        budget: Ceiling of the summed cost.
        solver: ``exact`` proves the answer or states the gap; ``greedy`` is the plain ascent.
        candidates: Complete picks that the answer must not be worse than, where they fit the budget
            (uniform choices).
        max_states: Limit of the exact search's memory, see :func:`~mlx_optiq_ext.allocate.close.close_gap`.
    Raises:
        BudgetInfeasible: Even the cheapest choices cost more.
        UsageError: Malformed items.
    """
    problem = build_problem(items)
    needed = cheapest_cost(items)
    if needed > budget:
        raise BudgetInfeasible(
            f"budget {budget} is below the cheapest picks ({needed}); raise it or add cheaper choices"
        )
    relaxation = relax(problem, budget)
    if solver == "greedy":
        starts = [ascend(problem, budget)]
    else:
        starts = [fill_slack(problem, picks, budget) for picks in (relaxation.picks, relaxation.next_picks)]
    starts += [_to_columns(problem, items, picks) for picks in candidates]
    best = min((start for start in starts if problem.cost_of(start) <= budget), key=problem.objective_of)
    bound, exact = relaxation.bound, False
    if solver == "exact":
        closed = close_gap(problem, relaxation, best, max_states=max_states)
        best, bound, exact = closed.picks, closed.lower_bound, closed.exact
    chosen = problem.original[np.arange(len(best)), best].tolist()
    picks = _spend_without_loss(items, chosen, budget)
    return _describe(items, picks, bound=bound, exact=exact, price=relaxation.price)


def cheapest_cost(items: Sequence[Item]) -> int:
    """Least cost any picks can have."""
    return sum(min(item.costs) for item in items)


def lower_bound(items: Sequence[Item], budget: int) -> float:
    """Objective that no picks within the budget can go below, from the linear relaxation alone.

    Raises:
        BudgetInfeasible: Even the cheapest choices cost more.
    """
    if cheapest_cost(items) > budget:
        raise BudgetInfeasible(
            f"budget {budget} is below the cheapest picks ({cheapest_cost(items)}); raise it"
        )
    return relax(build_problem(items), budget).bound


def _to_columns(problem: Problem, items: Sequence[Item], picks: Sequence[int]) -> Ints:
    """Columns of the problem that cost at most as much as ``picks`` and are as good, item by item."""
    columns = np.zeros(len(items), dtype=np.int64)
    for row, (item, pick) in enumerate(zip(items, picks, strict=True)):
        costs = problem.costs[row, : problem.count[row]]
        columns[row] = int(np.searchsorted(costs, item.costs[pick], side="right")) - 1
    return columns


def _spend_without_loss(items: Sequence[Item], picks: list[int], budget: int) -> list[int]:
    """Raise items to costlier choices of no greater objective, largest raise first, while they fit."""
    slack = budget - sum(item.costs[pick] for item, pick in zip(items, picks, strict=True))
    raises: list[tuple[int, int, int]] = []
    for row, (item, pick) in enumerate(zip(items, picks, strict=True)):
        limit = item.objective(pick)
        for choice, cost in enumerate(item.costs):
            extra = cost - item.costs[pick]
            if 0 < extra <= slack and item.objective(choice) <= limit:
                raises.append((-extra, row, choice))
    result = list(picks)
    raised: set[int] = set()
    for negative, row, choice in sorted(raises):
        if row not in raised and -negative <= slack:
            slack += negative
            result[row] = choice
            raised.add(row)
    return result


def _describe(
    items: Sequence[Item], picks: Sequence[int], *, bound: float, exact: bool, price: float
) -> Solution:
    """Add up what was picked."""
    chosen = list(zip(items, picks, strict=True))
    return Solution(
        picks=tuple(picks),
        cost=sum(item.costs[pick] for item, pick in chosen),
        value=math.fsum(item.values[pick] for item, pick in chosen),
        penalty=math.fsum(item.penalties[pick] for item, pick in chosen if item.penalties),
        lower_bound=bound,
        exact=exact,
        price=price,
    )
