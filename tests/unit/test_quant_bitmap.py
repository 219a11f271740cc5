"""Allocation: known small cases, floors, pins, comparison rows, error texts."""

import pytest
from msgspec.structs import replace
from support_allocation import choices, linear, small_table
from support_tables import CHOICES, MOE, make_table

from mlx_optiq_ext.allocate.bitmap import allocate, divergence_curve, price_bit_map
from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import KEEP, BitMap, Choice, Probe, SensitivityTable, Unit

FOUR_EIGHT = choices("4", "8")


def labels(allocation) -> dict[str, str]:
    return {path: choice.label for path, choice in allocation.bit_map.choices.items()}


def two_units(**extra):
    """Two equal units; one more byte helps ``b`` ten times as much as ``a``."""
    units = [linear("a", FOUR_EIGHT), linear("b", FOUR_EIGHT)]
    table = {"a": {"4": 0.02, "8": 0.001}, "b": {"4": 0.2, "8": 0.01}}
    return small_table(units, table, **extra)


def test_bits_go_where_they_help_most() -> None:
    allocation = allocate(two_units(), AllocateOptions(target_bpw=6.5))
    assert labels(allocation) == {"a": "4g64", "b": "8g64"}
    assert allocation.predicted_divergence == pytest.approx(0.03)
    assert allocation.achieved_bpw == 6.5
    assert allocation.nbytes == 2 * 64 * 128 * 6.5 / 8
    assert allocation.lower_bound == pytest.approx(0.03)


def test_what_cannot_be_quantized_counts_too() -> None:
    table = two_units(fixed_bits=1000 * 16, fixed_numel=1000)
    with pytest.raises(BudgetInfeasible):
        allocate(table, AllocateOptions(target_bpw=4.6))
    assert labels(allocate(table, AllocateOptions(target_bpw=6.6)))["b"] == "4g64"
    assert labels(allocate(table, AllocateOptions(target_bpw=7.1)))["b"] == "8g64"


def test_impossible_budget_names_the_cheapest_and_what_would_help() -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        allocate(two_units(), AllocateOptions(target_bpw=5.0, pin=("b=8",)))
    text = str(caught.value)
    assert "--target-bpw 5 allows 5.000 bpw" in text
    assert "cheapest allocation (6.500 bpw" in text
    assert "raise the target to 6.50 bpw" in text or "raise the target to 6.51 bpw" in text
    assert "drop --pin or --protect (2.00 bpw)" in text
    assert "fewer bits than 4g64" in text


def test_exact_probe_replaces_the_estimate_whatever_the_order() -> None:
    exact = Probe(path="a", choice=Choice.parse("4"), divergence=0.9, exact=True)
    for table in (two_units(extra_probes=[exact]), two_units(extra_probes=[exact])):
        ordered = replace(table, probes=tuple(reversed(table.probes)))
        for each in (table, ordered):
            assert labels(allocate(each, AllocateOptions(target_bpw=6.5))) == {"a": "8g64", "b": "4g64"}


def test_more_bits_measured_worse_are_no_loss() -> None:
    """Noise puts 5 bits above 4; pooled, both predict their mean, and the spare bits are used."""
    unit = linear("a", choices("4", "5"))
    table = small_table([unit], {"a": {"4": 0.10, "5": 0.12}})
    allocation = allocate(table, AllocateOptions(target_bpw=6.0))
    assert labels(allocation) == {"a": "5g64"}
    assert allocation.predicted_divergence == pytest.approx(0.11)


def test_pooling_trusts_the_probe_with_the_smaller_error() -> None:
    unit = linear("a", choices("4", "5"))
    probes = [
        Probe(path="a", choice=Choice.parse("4"), divergence=0.10, stderr=0.001),
        Probe(path="a", choice=Choice.parse("5"), divergence=0.20, stderr=0.1),
    ]
    table = small_table([unit], {}, extra_probes=probes)
    assert allocate(table, AllocateOptions(target_bpw=6.0)).predicted_divergence == pytest.approx(
        0.1, rel=1e-3
    )


def test_kept_tensor_costs_no_divergence_and_needs_no_probe() -> None:
    table = small_table([linear("a", choices("4", "keep"))], {"a": {"4": 0.1}})
    allocation = allocate(table, AllocateOptions(target_bpw=16.0))
    assert labels(allocation) == {"a": "keep"}
    assert allocation.predicted_divergence == 0.0


def test_unit_without_measurement_is_named() -> None:
    table = small_table([linear("a", FOUR_EIGHT), linear("b", FOUR_EIGHT)], {"a": {"4": 0.1}})
    with pytest.raises(UsageError, match="no measurement for b"):
        allocate(table, AllocateOptions(target_bpw=6.0))


def test_router_stays_at_eight_bits_and_says_what_it_costs() -> None:
    """A router whose error looks cheap would get four bits; it must not."""
    units = [linear("mlp.gate", FOUR_EIGHT, kind="router"), linear("mlp.up", FOUR_EIGHT)]
    table = small_table(units, {"mlp.gate": {"4": 0.01, "8": 0.0}, "mlp.up": {"4": 0.5, "8": 0.1}})
    allocation = allocate(table, AllocateOptions(target_bpw=6.5))
    assert labels(allocation) == {"mlp.gate": "8g64", "mlp.up": "4g64"}
    (pin,) = allocation.pins
    assert pin.path == "mlp.gate"
    assert "router" in pin.reason
    # Without the floor: gate 4 bits, up 8 bits, 0.11; with it 0.5.
    assert pin.cost_divergence == pytest.approx(0.39)
    assert pin.cost_bits == 64 * 128 * 4


def test_router_measured_only_below_its_floor_gets_the_floor() -> None:
    units = [linear("mlp.gate", choices("4"), kind="router"), linear("mlp.up", choices("4"))]
    table = small_table(units, {"mlp.gate": {"4": 0.01}, "mlp.up": {"4": 0.5}})
    allocation = allocate(table, AllocateOptions(target_bpw=8.0))
    assert labels(allocation) == {"mlp.gate": "8g64", "mlp.up": "4g64"}


def test_floor_of_the_family_holds_unless_pinned() -> None:
    table = small_table(
        [linear("a", FOUR_EIGHT, floor=Choice.parse("8")), linear("b", FOUR_EIGHT)],
        {"a": {"4": 0.01, "8": 0.001}, "b": {"4": 0.01, "8": 0.001}},
    )
    assert labels(allocate(table, AllocateOptions(target_bpw=7.0))) == {"a": "8g64", "b": "4g64"}
    pinned = allocate(table, AllocateOptions(target_bpw=5.0, pin=("a=4",)))
    assert labels(pinned) == {"a": "4g64", "b": "4g64"}


def test_pin_below_everything_measured_is_refused() -> None:
    with pytest.raises(UsageError, match=r"2g64 costs a .* 4g64, 8g64 only.* 2g64 added to --candidate-bits"):
        allocate(two_units(), AllocateOptions(target_bpw=8.5, pin=("a=2",)))


def test_pin_to_an_unmeasured_choice_uses_the_next_cheaper_measurement() -> None:
    allocation = allocate(two_units(), AllocateOptions(target_bpw=8.5, pin=("a=6", "b=4")))
    assert labels(allocation) == {"a": "6g64", "b": "4g64"}
    assert allocation.predicted_divergence == pytest.approx(0.22)
    # Without pins both are stored in 8 bits at 0.011: together the pins cost the rest.
    assert sum(pin.cost_divergence for pin in allocation.pins) == pytest.approx(0.22 - 0.011)


def test_protected_edges_are_the_head_and_the_end_blocks_at_the_widest_quantized_choice() -> None:
    table = make_table(blocks=4)
    kept = tuple(replace(unit, choices=(*CHOICES, KEEP)) for unit in table.units)
    options = AllocateOptions(target_bpw=7.5, protect="edges", pin=("*.0.mlp.up_proj=4",))
    allocation = allocate(replace(table, units=kept), options)
    for unit in table.units:
        if unit.path == "model.layers.0.mlp.up_proj":
            assert labels(allocation)[unit.path] == "4g64"  # --pin wins over --protect
        elif unit.block in (None, 0, 3):
            assert labels(allocation)[unit.path] == "8g64"
    reasons = {pin.path: pin.reason for pin in allocation.pins}
    assert reasons["model.embed_tokens"] == "--protect edges: embedding"
    assert reasons["model.layers.3.mlp.up_proj"] == "--protect edges: last block"
    assert reasons["model.layers.0.mlp.up_proj"] == "--pin *.0.mlp.up_proj=4g64"


def test_uniform_rows_are_in_ascending_bits_with_their_real_size() -> None:
    table = make_table(blocks=3)
    rows = allocate(table, AllocateOptions(target_bpw=5.0)).uniform
    assert [row[0] for row in rows] == ["2g64", "3g64", "4g64", "5g64", "6g64", "8g64"]
    four = price_bit_map(table, _stored_as(table, {}, "4"))
    assert rows[2][1:] == (four.achieved_bpw, four.predicted_divergence)


def test_uniform_takes_the_nearest_choice_where_a_shape_or_floor_refuses() -> None:
    units = [
        linear("a", choices("4", "8")),
        linear("narrow", choices("4g32", "8g32"), columns=96),
        linear("gate", choices("4", "8"), kind="router"),
    ]
    row = {"4": 0.1, "8": 0.01}
    table = small_table(units, {"a": row, "narrow": {"4g32": 0.1, "8g32": 0.01}, "gate": row})
    nearest = price_bit_map(table, _stored_as(table, {"narrow": "4g32", "gate": "8"}, "4"))
    rows = {label: (bpw, divergence) for label, bpw, divergence in nearest.uniform}
    assert rows["4g64"] == (nearest.achieved_bpw, nearest.predicted_divergence)


def test_a_given_bit_map_is_priced_as_an_allocation_of_the_same_choices() -> None:
    table = make_table(blocks=3)
    chosen = allocate(table, AllocateOptions(target_bpw=5.0))
    priced = price_bit_map(table, chosen.bit_map)
    assert priced.solver == "given"
    assert priced.target_bpw == priced.achieved_bpw == chosen.achieved_bpw
    for name in ("bit_map", "nbytes", "predicted_divergence", "predicted_stderr", "uniform", "worst_domain"):
        assert getattr(priced, name) == getattr(chosen, name), name
    assert 0 < priced.lower_bound <= chosen.predicted_divergence


def test_a_given_bit_map_may_go_below_floors_and_is_told_what_was_possible() -> None:
    table = small_table(
        [linear("gate", choices("4", "8"), kind="router"), linear("a", choices("4", "8"))],
        {"gate": {"4": 0.1, "8": 0.01}, "a": {"4": 0.5, "8": 0.05}},
    )
    priced = price_bit_map(table, _stored_as(table, {"gate": "4"}, "8"))
    assert labels(priced) == {"gate": "4g64", "a": "8g64"}
    assert priced.predicted_divergence == pytest.approx(0.15)
    poor = price_bit_map(table, _stored_as(table, {"a": "4"}, "8"))
    assert poor.predicted_divergence == pytest.approx(0.51)
    assert poor.lower_bound == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"b": "8"}, "a and b are stored alike, and the bit map has 4g64 and 8g64"),
        ({"a": "4g128", "b": "4g128"}, "cannot be stored as 4g128"),
        ({"a": "2", "b": "2"}, "what 2g64 costs a is not known"),
        ({"more": "4"}, "only one of them has more$"),
        ({"more": "4", "and": "4"}, "only one of them has and and 1 more"),
    ],
)
def test_a_bit_map_that_does_not_belong_is_refused(stored: dict[str, str], message: str) -> None:
    unit = linear("a", choices("4", "8"), columns=192, paths=("a", "b"))
    table = small_table([unit], {"a": {"4": 0.1, "8": 0.01}})
    with pytest.raises(UsageError, match=message):
        price_bit_map(table, _stored_as(table, stored, "4"))
    with pytest.raises(UsageError, match="only one of them has a and 1 more"):
        price_bit_map(table, BitMap(choices={}))


def _stored_as(table: SensitivityTable, named: dict[str, str], rest: str) -> BitMap:
    """Every path of the table as ``rest``, those in ``named`` as it says."""
    words = {path: rest for unit in table.units for path in unit.paths} | named
    return BitMap(choices={path: Choice.parse(word) for path, word in words.items()})


def test_speed_weight_saves_bits_that_every_token_reads() -> None:
    """Experts are read by a quarter of the tokens: their bits are cheaper in time, not in memory."""
    experts = linear("experts", FOUR_EIGHT, kind="experts", active_share=0.25)
    table = small_table(
        [experts, linear("dense", FOUR_EIGHT)],
        {"experts": {"4": 0.1, "8": 0.01}, "dense": {"4": 0.1, "8": 0.01}},
    )
    plain = allocate(table, AllocateOptions(target_bpw=8.5))
    fast = allocate(table, AllocateOptions(target_bpw=8.5, speed_weight=0.05))
    assert labels(plain) == {"experts": "8g64", "dense": "8g64"}
    # Dense reads 4·0.8 bits more per active weight for 0.09 nats (0.16 at this weight); experts 4·0.2.
    assert labels(fast) == {"experts": "8g64", "dense": "4g64"}
    assert fast.lower_bound <= fast.predicted_divergence


def test_worst_domain_is_the_largest_sum() -> None:
    probe = Probe(path="a", choice=Choice.parse("4"), divergence=0.2, by_domain=(0.1, 0.3), stderr=0.02)
    other = Probe(path="b", choice=Choice.parse("4"), divergence=0.2, by_domain=(0.25, 0.15), stderr=0.01)
    units = [linear("a", choices("4")), linear("b", choices("4"))]
    table = small_table(units, {}, extra_probes=[probe, other], domains=("prose", "code"))
    allocation = allocate(table, AllocateOptions(target_bpw=5.0))
    assert allocation.worst_domain == "code"
    assert allocation.worst_domain_divergence == pytest.approx(0.45)
    assert allocation.predicted_stderr == pytest.approx(0.03)


@pytest.mark.parametrize(
    "given", [{}, {"target_bpw": 5.0, "target_size": "1GB"}, {"target_size": "1GB", "fit": "8GB"}]
)
def test_exactly_one_target_is_asked_for(given) -> None:
    with pytest.raises(UsageError, match="give exactly one of --target-bpw, --target-size, --fit"):
        allocate(two_units(), AllocateOptions(**given))


def test_target_size_is_a_ceiling_of_the_files() -> None:
    table = make_table(blocks=12)
    allocation = allocate(table, AllocateOptions(target_size="60MB"))
    assert 59_000_000 < allocation.nbytes < 60_000_000 - 85 * 300


def test_moe_table_respects_routers_at_every_budget() -> None:
    table = make_table(blocks=4, modules=MOE)
    for target in (3.2, 4.5, 6.0):
        allocation = allocate(table, AllocateOptions(target_bpw=target))
        routers = [unit.path for unit in table.units if unit.kind == "router"]
        assert {labels(allocation)[path] for path in routers} == {"8g64"}


def test_greedy_is_named_and_no_better_than_exact() -> None:
    table = make_table(blocks=6)
    exact = allocate(table, AllocateOptions(target_bpw=4.4))
    greedy = allocate(table, AllocateOptions(target_bpw=4.4, solver="greedy"))
    assert greedy.solver == "greedy"
    assert exact.predicted_divergence <= greedy.predicted_divergence <= 1.05 * exact.predicted_divergence
    assert greedy.lower_bound <= exact.predicted_divergence


def test_curve_passes_through_the_allocation() -> None:
    table = make_table(blocks=4)
    allocation = allocate(table, AllocateOptions(target_bpw=4.7))
    assert divergence_curve(table, [1.2, 4.7]) == [(allocation.achieved_bpw, allocation.predicted_divergence)]


def test_shapeless_published_units_can_be_allocated_and_pinned() -> None:
    unit = Unit(paths=("a",), shape=(), numel=64 * 100, kind="linear", choices=FOUR_EIGHT)
    table = small_table([unit], {"a": {"4": 0.1, "8": 0.01}})
    assert labels(allocate(table, AllocateOptions(target_bpw=9, pin=("a=4",)))) == {"a": "4g64"}
