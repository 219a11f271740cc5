"""What every allocation keeps: its budget, its floors, its pins, and the promise against uniform."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_allocation import choices, linear, small_table
from support_tables import MOE, make_table

from mlx_optiq_ext.allocate.bitmap import allocate, divergence_curve
from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import KEEP, Choice, SensitivityTable

_OFFERED = choices("2", "3", "4g32", "4", "5", "6", "8", "mxfp4")


@st.composite
def tables(draw) -> SensitivityTable:
    """Up to ten units of different sizes, noisy and not monotone; some fused, some with a floor."""
    units, divergences = [], {}
    for index in range(draw(st.integers(1, 10))):
        path = f"model.layers.{index}.proj"
        offered = sorted(draw(st.sets(st.sampled_from(_OFFERED), min_size=1)), key=lambda c: (c.bpw(), c))
        rows = draw(st.sampled_from([32, 64, 96, 256]))
        fused = draw(st.booleans())
        floor = draw(st.sampled_from([None, None, offered[0], offered[-1]]))
        share = draw(st.sampled_from([1.0, 0.25]))
        scale = draw(st.floats(1e-4, 1.0))
        units.append(
            linear(
                path,
                offered,
                rows=rows,
                block=index,
                paths=(path, f"{path}_twin") if fused else (path,),
                numel=rows * 128 * (2 if fused else 1),
                floor=floor,
                active_share=share,
            )
        )
        divergences[path] = {
            choice.label: scale * 4.0**-choice.bits * draw(st.floats(0.3, 3.0)) for choice in offered
        }
    return small_table(units, divergences, fixed_bits=draw(st.integers(0, 4096)), fixed_numel=256)


def stored_bits(table: SensitivityTable, chosen: dict[str, Choice]) -> int:
    """Bits of a bit map, counted anew."""
    return table.fixed_bits + sum(
        chosen[path].stored_bits(unit.numel // len(unit.paths)) for unit in table.units for path in unit.paths
    )


def cheapest_bpw(table: SensitivityTable) -> float:
    with pytest.raises(BudgetInfeasible) as caught:
        allocate(table, AllocateOptions(target_bpw=1.01))
    return float(str(caught.value).split("allocation (")[1].split(" bpw")[0]) + 0.001


_TARGET = st.floats(0, 6)
_SOLVER = st.sampled_from(["exact", "greedy"])


@settings(max_examples=60)
@given(tables(), _TARGET, _SOLVER, st.sampled_from([0.0, 0.01]))
def test_all_stored_bits_stay_within_the_target(table, above, solver, speed_weight) -> None:
    target = cheapest_bpw(table) + above
    options = AllocateOptions(target_bpw=target, solver=solver, speed_weight=speed_weight)
    allocation = allocate(table, options)
    chosen = allocation.bit_map.choices
    bits = stored_bits(table, chosen)
    assert bits <= target * table.total_numel
    assert allocation.achieved_bpw == pytest.approx(bits / table.total_numel)
    assert allocation.nbytes == math.ceil(bits / 8)
    assert allocation.lower_bound <= allocation.predicted_divergence
    assert set(chosen) == {path for unit in table.units for path in unit.paths}
    for unit in table.units:
        assert len({chosen[path] for path in unit.paths}) == 1
        assert unit.floor is None or chosen[unit.path].bits >= unit.floor.bits
        assert unit.floor is None or chosen[unit.path].bpw() >= unit.floor.bpw()


@settings(max_examples=60)
@given(tables(), _TARGET, st.floats(0.001, 2))
def test_more_bits_never_predict_worse(table, above, more) -> None:
    target = cheapest_bpw(table) + above
    less = allocate(table, AllocateOptions(target_bpw=target))
    assert allocate(table, AllocateOptions(target_bpw=target + more)).predicted_divergence <= (
        less.predicted_divergence * (1 + 1e-9)
    )


@settings(max_examples=60)
@given(tables(), _SOLVER)
def test_never_worse_than_any_uniform_choice_at_its_bits(table, solver) -> None:
    rows = allocate(table, AllocateOptions(target_bpw=33.0)).uniform
    assert rows
    for _, bpw, divergence in rows:
        own = allocate(table, AllocateOptions(target_bpw=bpw + 1e-9, solver=solver))
        assert own.predicted_divergence <= divergence * (1 + 1e-9)


@settings(max_examples=30)
@given(tables(), _TARGET)
def test_same_table_same_allocation(table, above) -> None:
    options = AllocateOptions(target_bpw=cheapest_bpw(table) + above)
    assert allocate(table, options) == allocate(table, options)


@settings(max_examples=40)
@given(tables(), st.sampled_from(["4g64", "8g64", "keep"]))
def test_pins_hold_and_their_costs_add_up(table, label) -> None:
    pin = f"{table.units[0].path}={label}"
    options = AllocateOptions(target_bpw=20.0, pin=(pin,))
    wanted = Choice.parse(label)
    if wanted != KEEP and all(choice.bpw() > wanted.bpw() for choice in table.units[0].choices):
        with pytest.raises(UsageError, match="--candidate-bits"):
            allocate(table, options)
        return
    allocation = allocate(table, options)
    for path in table.units[0].paths:
        assert allocation.bit_map.choices[path].label == label
    assert all(found.cost_divergence >= 0 for found in allocation.pins)
    assert any(found.path == table.units[0].path and label in found.reason for found in allocation.pins)


@pytest.mark.parametrize("modules", [None, MOE])
def test_every_feasible_target_is_met_within_two_hundredths(modules) -> None:
    """Required of every model: stored bpw ≤ target and within 0.02 of it, from 3.0 to 8.0."""
    table = make_table(blocks=24) if modules is None else make_table(blocks=16, modules=modules)
    for step in range(51):
        target = 3.0 + 0.1 * step
        achieved = allocate(table, AllocateOptions(target_bpw=target)).achieved_bpw
        assert 0 <= target - achieved < 0.02


def test_curve_falls_with_the_bits() -> None:
    points = divergence_curve(make_table(blocks=6), [1.5, *(2.6 + 0.2 * step for step in range(30))])
    assert len(points) == 30
    assert points == sorted(points)
    assert [value for _, value in points] == sorted((value for _, value in points), reverse=True)
