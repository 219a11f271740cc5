"""Close the gap between the relaxed knapsack and whole choices: proven best picks.

Around the price of the relaxation every deviation of an item has a reduced cost ≥ 0; only deviations whose
reduced cost is below the gap can be part of something better. They are combined by dynamic programming
over (cost, objective) states, cheapest deviations first. Called by ``budget``.
"""

import msgspec
import numpy as np

from mlx_optiq_ext.allocate.problem import Floats, Ints, Problem
from mlx_optiq_ext.allocate.relax import Relaxation

__all__ = ["Closed", "close_gap"]


class Closed(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What is known after the search."""

    picks: Ints
    objective: float
    """Summed value plus penalty of ``picks``."""
    lower_bound: float
    """Likewise: no picks within the budget have less."""
    exact: bool


class _Core(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Items that may deviate from the relaxed picks, most likely first, and what is still to come."""

    items: list[int]
    moves: list[Ints]
    """Columns an item may move to, per core item."""
    raise_rate: Floats
    """Least reduced cost per cost added among the items from this position on; shape (items + 1,)."""
    lower_rate: Floats
    """The same per cost saved."""


class _States(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Partial answers: extra cost and extra objective against the relaxed picks, and where they came from."""

    extra: Ints
    change: Floats
    parent: Ints
    move: Ints
    """Column taken by the newest core item; -1: it stays."""


def close_gap(problem: Problem, relaxation: Relaxation, incumbent: Ints, *, max_states: int) -> Closed:
    """Find the best picks, or prove how far the best found can be from them.

    Args:
        incumbent: Feasible picks to beat.
        max_states: Partial answers kept per item; where more survive, the least promising are dropped and
            the answer carries a proven gap instead of a proof of being the best.
    Source: Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", European Journal of
        Operational Research 83 (1995): expanding core, bounds by the price.
    """
    search = _Search(problem, relaxation, incumbent, max_states)
    return search.run()


class _Search:
    """One run of the dynamic programme; holds the best answer so far."""

    def __init__(self, problem: Problem, relaxation: Relaxation, incumbent: Ints, max_states: int) -> None:
        rows = np.arange(len(problem.count))
        base = relaxation.picks
        self.problem, self.relaxation, self.max_states = problem, relaxation, max_states
        self.extra = problem.costs - problem.costs[rows, base][:, None]
        self.change = problem.objective - problem.objective[rows, base][:, None]
        self.reduced = np.maximum(self.change + relaxation.price * self.extra, 0.0)
        self.base_objective = problem.objective_of(base)
        self.tolerance = 1e-12 * float(np.abs(problem.objective[rows, base]).sum())
        self.best_picks = incumbent
        self.best_change = problem.objective_of(incumbent) - self.base_objective
        self.dropped = np.inf

    @property
    def gap(self) -> float:
        """Best answer minus the bound, less the tolerance: what an improvement must stay below."""
        return self.best_change + self.relaxation.price * self.relaxation.slack - self.tolerance

    def run(self) -> Closed:
        """Expand the core until nothing can improve."""
        core = self._build_core()
        states = _States(
            extra=np.zeros(1, dtype=np.int64),
            change=np.zeros(1),
            parent=np.zeros(1, dtype=np.int64),
            move=np.zeros(1, dtype=np.int64),
        )
        trail: list[_States] = []
        for position in range(len(core.items)):
            states = self._prune(self._expand(states, core, position), core, position + 1)
            trail.append(states)
            if not len(states.extra):
                break
            self._note_best(states, trail, core)
        bound = min(self.best_change, self.dropped - self.relaxation.price * self.relaxation.slack)
        return Closed(
            picks=self.best_picks,
            objective=self.problem.objective_of(self.best_picks),
            lower_bound=self.base_objective + bound,
            exact=bound >= self.best_change - self.tolerance,
        )

    def _build_core(self) -> _Core:
        """Order the items by their cheapest deviation per unit of cost."""
        moving = (self.reduced < self.gap) & (self.extra != 0) & np.isfinite(self.change)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(moving, self.reduced / np.abs(self.extra), np.inf)
        least = rate.min(axis=1)
        order = np.argsort(least, kind="stable")
        items = [int(item) for item in order if np.isfinite(least[item])]
        up = np.where(self.extra > 0, rate, np.inf).min(axis=1)[items]
        down = np.where(self.extra < 0, rate, np.inf).min(axis=1)[items]
        return _Core(
            items=items,
            moves=[np.flatnonzero(moving[item]) for item in items],
            raise_rate=_suffix_minimum(up),
            lower_rate=_suffix_minimum(down),
        )

    def _expand(self, states: _States, core: _Core, position: int) -> _States:
        """Every state with the next core item staying, or moving to one of its columns."""
        item = core.items[position]
        moves = core.moves[position]
        moves = moves[self.reduced[item, moves] < self.gap]
        count = len(states.extra)
        columns = np.concatenate([np.full(1, -1, dtype=np.int64), moves])
        extra = np.concatenate([np.zeros(1, dtype=np.int64), self.extra[item, moves]])
        change = np.concatenate([np.zeros(1), self.change[item, moves]])
        return _States(
            extra=(extra[:, None] + states.extra).ravel(),
            change=(change[:, None] + states.change).ravel(),
            parent=np.tile(np.arange(count), len(columns)),
            move=np.repeat(columns, count),
        )

    def _prune(self, states: _States, core: _Core, upcoming: int) -> _States:
        """Drop what cannot beat the best answer, then what a cheaper and better state beats."""
        price, slack = self.relaxation.price, self.relaxation.slack
        short = (slack - states.extra).astype(np.float64)
        bound = states.change + price * states.extra
        up_rate = min(price, float(core.raise_rate[upcoming]))
        down_rate = float(core.lower_rate[upcoming])
        # inf · 0 must not arise: a rate applies only to states on its side of the budget.
        bound = bound + np.where(short > 0, up_rate * np.maximum(short, 0.0), 0.0)
        over = short < 0
        bound[over] += down_rate * -short[over]
        alive = np.flatnonzero(bound < self.gap)
        order = alive[np.lexsort((states.change[alive], states.extra[alive]))]
        change = states.change[order]
        better = np.ones(len(order), dtype=np.bool_)
        better[1:] = change[1:] < np.minimum.accumulate(change)[:-1]
        order = order[better]
        if len(order) > self.max_states:
            ranked = order[np.argsort(bound[order], kind="stable")]
            self.dropped = min(self.dropped, float(bound[ranked[self.max_states]]))
            order = np.sort(ranked[: self.max_states])
        return _States(
            extra=states.extra[order],
            change=states.change[order],
            parent=states.parent[order],
            move=states.move[order],
        )

    def _note_best(self, states: _States, trail: list[_States], core: _Core) -> None:
        """Take over the best complete answer among the states, every later item staying as it is."""
        change = np.where(states.extra <= self.relaxation.slack, states.change, np.inf)
        index = int(np.argmin(change))
        if change[index] >= self.best_change - self.tolerance:
            return
        self.best_change = float(change[index])
        picks = self.relaxation.picks.copy()
        for position in range(len(trail) - 1, -1, -1):
            move = int(trail[position].move[index])
            if move >= 0:
                picks[core.items[position]] = move
            index = int(trail[position].parent[index])
        self.best_picks = picks


def _suffix_minimum(values: Floats) -> Floats:
    """Minimum of the entries from each position on, with infinity behind the last."""
    padded = np.append(values, np.inf)
    return np.minimum.accumulate(padded[::-1])[::-1]
