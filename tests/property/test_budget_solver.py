"""The budget solver against brute force, and what must hold for every instance."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.allocate.budget import Item, cheapest_cost, lower_bound, solve
from mlx_optiq_ext.errors import BudgetInfeasible, UsageError

# Small whole numbers give ties and dominated choices; floats give none.
_VALUES = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1, allow_subnormal=False))
_CHOICE = st.tuples(st.integers(0, 12), _VALUES)
_PENALTY = st.floats(0, 0.5, allow_subnormal=False)


@st.composite
def items(draw, most: int = 5, with_penalties: bool = False) -> list[Item]:
    made = []
    for choices in draw(st.lists(st.lists(_CHOICE, min_size=1, max_size=4), min_size=1, max_size=most)):
        penalties = tuple(draw(_PENALTY) for _ in choices) if with_penalties and draw(st.booleans()) else ()
        costs, values = zip(*choices, strict=True)
        made.append(Item(costs=costs, values=values, penalties=penalties))
    return made


def best_by_hand(instance: list[Item], budget: int) -> float:
    every = itertools.product(*(range(len(item.costs)) for item in instance))
    return min(
        math.fsum(item.objective(pick) for item, pick in zip(instance, picks, strict=True))
        for picks in every
        if sum(item.costs[pick] for item, pick in zip(instance, picks, strict=True)) <= budget
    )


@given(items(with_penalties=True), st.integers(0, 60))
def test_exact_solver_equals_brute_force(instance: list[Item], extra: int) -> None:
    budget = cheapest_cost(instance) + extra
    solution = solve(instance, budget)
    best = best_by_hand(instance, budget)
    assert solution.exact
    assert solution.objective == pytest.approx(best, abs=1e-9)
    assert solution.lower_bound <= best + 1e-9
    assert lower_bound(instance, budget) <= best + 1e-9


@given(items(most=30), st.integers(0, 360), st.sampled_from(["exact", "greedy"]))
def test_budget_is_never_exceeded_and_sums_are_right(instance: list[Item], extra: int, solver) -> None:
    budget = cheapest_cost(instance) + extra
    solution = solve(instance, budget, solver=solver)
    chosen = list(zip(instance, solution.picks, strict=True))
    assert solution.cost == sum(item.costs[pick] for item, pick in chosen) <= budget
    assert solution.value == pytest.approx(math.fsum(item.values[pick] for item, pick in chosen))
    assert solution.lower_bound <= solution.objective + 1e-9


@given(items(most=30), st.integers(0, 200), st.integers(1, 100))
def test_more_budget_never_predicts_worse(instance: list[Item], extra: int, more: int) -> None:
    budget = cheapest_cost(instance) + extra
    assert solve(instance, budget + more).value <= solve(instance, budget).value + 1e-9


@given(items(most=20), st.integers(0, 200), st.sampled_from(["exact", "greedy"]))
def test_same_question_same_answer(instance: list[Item], extra: int, solver) -> None:
    budget = cheapest_cost(instance) + extra
    assert solve(instance, budget, solver=solver) == solve(list(instance), budget, solver=solver)


@given(items(most=12), st.integers(0, 100), st.randoms(use_true_random=False))
def test_order_of_items_does_not_matter(instance: list[Item], extra: int, rng) -> None:
    shuffled = rng.sample(instance, len(instance))
    budget = cheapest_cost(instance) + extra
    assert solve(shuffled, budget).value == pytest.approx(solve(instance, budget).value, abs=1e-9)


@given(items(most=20), st.integers(0, 200), st.sampled_from(["exact", "greedy"]), st.data())
def test_never_worse_than_a_candidate_that_fits(instance, extra, solver, data) -> None:
    budget = cheapest_cost(instance) + extra
    picks = [data.draw(st.integers(0, len(item.costs) - 1)) for item in instance]
    chosen = list(zip(instance, picks, strict=True))
    assume(sum(item.costs[pick] for item, pick in chosen) <= budget)
    solution = solve(instance, budget, solver=solver, candidates=[picks])
    assert solution.value <= sum(item.values[pick] for item, pick in chosen) + 1e-9


@given(items(most=20), st.integers(0, 200))
def test_nothing_that_fits_and_loses_nothing_is_left_unbought(instance: list[Item], extra: int) -> None:
    budget = cheapest_cost(instance) + extra
    solution = solve(instance, budget)
    left = budget - solution.cost
    for item, pick in zip(instance, solution.picks, strict=True):
        for choice, cost in enumerate(item.costs):
            if 0 < cost - item.costs[pick] <= left:
                assert item.objective(choice) > item.objective(pick) - 1e-9
                assert item.objective(choice) != item.objective(pick)


def _model(units: int, noise: float, seed: int) -> tuple[list[Item], int]:
    """Units like those of a decoder: seven shapes, 18 choices, log-normal sensitivities."""
    rng = np.random.default_rng(seed)
    shapes = [331_776, 110_592, 110_592, 331_776, 884_736, 884_736, 884_736]
    made, total = [], 0
    for index in range(units):
        numel = shapes[index % len(shapes)]
        scale = float(np.exp(rng.normal()) * numel / 1e6)
        grid = [(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
        values = [scale * 4.0**-b * (1 + g / 300) * float(np.exp(noise * rng.normal())) for b, g in grid]
        made.append(Item(costs=tuple(numel * b + numel // g * 32 for b, g in grid), values=tuple(values)))
        total += numel
    return made, total


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("bpw", [3.0, 4.5, 5.0, 7.9])
def test_500_units_of_18_choices_are_solved_to_proof(noise: float, bpw: float) -> None:
    made, total = _model(500, noise, seed=3)
    solution = solve(made, int(bpw * total))
    assert solution.exact
    assert 0 <= bpw - solution.cost / total < 0.002


def test_5000_units_have_a_proven_gap() -> None:
    made, total = _model(5000, 0.1, seed=4)
    solution = solve(made, int(4.7 * total))
    assert solution.value - solution.lower_bound <= 1e-6 * solution.value


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_dropped_states_leave_a_valid_bound(seed: int) -> None:
    """Values that follow the costs closely are the hard case; three states cannot settle it."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(8):
        costs = sorted(int(c) for c in rng.integers(50, 200, size=4))
        values = tuple(300.0 - cost + float(rng.integers(0, 4)) for cost in costs)
        made.append(Item(costs=tuple(costs), values=values))
    budget = cheapest_cost(made) + 117
    hasty, thorough = solve(made, budget, max_states=3), solve(made, budget)
    assert hasty.lower_bound <= thorough.value + 1e-9
    assert thorough.value <= hasty.value + 1e-9
    assert not hasty.exact or hasty.value == pytest.approx(thorough.value)


def test_budget_below_the_cheapest_picks_is_refused() -> None:
    instance = [Item(costs=(4, 8), values=(1.0, 0.0)), Item(costs=(3,), values=(0.5,))]
    with pytest.raises(BudgetInfeasible, match="budget 6 is below the cheapest picks \\(7\\)"):
        solve(instance, 6)
    assert solve(instance, 7).cost == 7


@pytest.mark.parametrize(
    "item",
    [
        Item(costs=(), values=()),
        Item(costs=(1, 2), values=(0.0,)),
        Item(costs=(1,), values=(math.nan,)),
        Item(costs=(-1,), values=(0.0,)),
        Item(costs=(1, 2), values=(0.0, 1.0), penalties=(0.0,)),
    ],
)
def test_malformed_item_is_refused(item: Item) -> None:
    with pytest.raises(UsageError, match="item 0 has"):
        solve([item], 10)
