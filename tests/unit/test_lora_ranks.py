"""Ranks: the three rules, their ceilings, and what a user is told."""

import numpy as np
import pytest
from support_lora import quantized_model, table_for
from support_models import LLAMA, QWEN3_MOE, quantize_by, tiny_model

from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.lora.ranks import plan_ranks, rank_by_bits
from mlx_optiq_ext.lora.spectrum import noise_spectrum, shares
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.quant import KEEP, BitMap, Choice, Probe

V, DOWN = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("label", "rank", "expected"),
    [("2g64", 8, 4), ("3g64", 8, 6), ("4g64", 8, 8), ("8g64", 8, 16), ("3g64", 7, 6), ("2g64", 1, 2)],
)
def test_by_bits_is_the_published_rule(label: str, rank: int, expected: int) -> None:
    assert rank_by_bits(Choice.parse(label), rank) == expected


def test_by_bits_gives_more_rank_to_more_bits_and_says_what_that_means() -> None:
    model = tiny_model()
    paths = [target.path for target in list_targets(model)]
    choices = {path: Choice.parse("8g64" if path == DOWN else "3g64") for path in paths} | {V: KEEP}
    quantize_by(model, BitMap(choices=choices))
    ranks = plan_ranks(model, AdapterOptions(rank=8, rank_scaling="by_bits"))
    assert (ranks.ranks[DOWN], ranks.ranks[V]) == (16, 8)
    assert {rank for path, rank in ranks.ranks.items() if path not in (DOWN, V)} == {6}
    assert any("less quantization error" in note for note in ranks.notes)


def test_rank_follows_the_root_of_sensitivity_per_parameter_at_the_same_parameters() -> None:
    model = quantized_model("4g64")
    targets = [t for t in list_targets(model) if t.kind == "linear"]
    table = table_for(tuple(targets), {**dict.fromkeys((t.path for t in targets), 0.001), DOWN: 0.009})
    constant = plan_ranks(model, AdapterOptions(rank=8, rank_scaling="constant"))
    ranks = plan_ranks(model, AdapterOptions(rank=8), table=table)
    assert ranks.scaling == "by_sensitivity"
    assert constant.num_parameters - 400 < ranks.num_parameters <= constant.num_parameters
    per_root = {
        t.path: (ranks.ranks[t.path] + 0.5) * (t.parameters_per_rank / (9 if t.path == DOWN else 1)) ** 0.5
        for t in targets
    }
    assert max(per_root.values()) < 1.25 * min(per_root.values())  # whole ranks
    assert ranks.notes == ()


def test_bits_hide_no_sensitivity() -> None:
    """What was given more bits because it is sensitive keeps its rank, though its own error is small."""
    model = tiny_model()
    paths = [target.path for target in list_targets(model)]
    quantize_by(
        model, BitMap(choices={p: Choice.parse("8g64" if p == V else "4g64") for p in paths if p != DOWN})
    )
    targets = list_targets(model)
    table = table_for(targets, dict.fromkeys(paths, 0.001))
    table = type(table)(
        **{
            **_fields(table),
            "probes": tuple(
                Probe(path=p.path, choice=Choice.parse("4g64"), divergence=p.divergence) for p in table.probes
            ),
        }
    )
    ranks = plan_ranks(model, AdapterOptions(), table=table)
    other = V.replace("v_proj", "k_proj")
    assert ranks.ranks[V] == ranks.ranks[other]
    assert ranks.sensitivities[V] == ranks.sensitivities[other]
    assert ranks.ranks[DOWN] == ranks.ranks[DOWN.replace("layers.1", "layers.0")]  # not quantized at all
    undoing = plan_ranks(model, AdapterOptions(init="error"), table=table)
    assert undoing.sensitivities[V] < 0.01 * undoing.sensitivities[other]
    assert undoing.ranks[V] == 4
    assert DOWN not in undoing.sensitivities


def test_no_module_gets_more_than_four_times_the_average_rank() -> None:
    model = quantized_model("4g64")
    targets = list_targets(model)
    table = table_for(targets, {**dict.fromkeys((t.path for t in targets), 1e-9), DOWN: 1.0})
    ranks = plan_ranks(model, AdapterOptions(rank=8), table=table)
    assert ranks.ranks[DOWN] == 32


def test_what_was_not_measured_is_taken_to_be_typical() -> None:
    model = quantized_model("4g64")
    targets = list_targets(model)
    table = table_for(targets, dict.fromkeys((t.path for t in targets), 0.001))
    units = tuple(unit for unit in table.units if unit.path != DOWN)
    ranks = plan_ranks(model, AdapterOptions(), table=type(table)(**{**_fields(table), "units": units}))
    assert ranks.ranks[DOWN] == ranks.ranks[DOWN.replace("layers.1", "layers.0")]


def test_a_start_from_the_error_puts_rank_where_the_error_is() -> None:
    model = quantized_model("4g64")
    targets = list_targets(model)
    table = table_for(targets, {**dict.fromkeys((t.path for t in targets), 0.001), DOWN: 0.02})
    ranks = plan_ranks(model, AdapterOptions(rank=8, init="error"), table=table)
    assert ranks.ranks[DOWN] > 3 * 8
    assert max(rank for path, rank in ranks.ranks.items() if path != DOWN) < 8
    assert min(ranks.ranks.values()) == 4  # half of it goes everywhere
    down = next(target for target in targets if target.path == DOWN)
    expected = 0.02 * shares(noise_spectrum(down.inputs, down.outputs))[: ranks.ranks[DOWN]].sum()
    assert ranks.gains[DOWN] == pytest.approx(expected)
    assert any("independent rounding errors" in note for note in ranks.notes)


def test_measured_spectra_decide_between_equally_sensitive_modules() -> None:
    model = quantized_model("4g64")
    targets = [t for t in list_targets(model) if t.group == "mlp"]
    table = table_for(tuple(targets), dict.fromkeys((t.path for t in targets), 0.01))
    flat = {t.path: np.ones(t.max_rank) for t in targets}
    steep = {**flat, DOWN: np.array([1000.0, 500.0, 250.0, *np.full(125, 0.01)])}
    options = AdapterOptions(rank=2, targets="mlp", init="error")
    ranks = plan_ranks(model, options, table=table, spectra=steep)
    assert ranks.ranks[DOWN] == 3
    assert not any("independent" in note for note in ranks.notes)


def test_a_unit_of_several_paths_shares_its_divergence_and_other_widths_are_derived() -> None:
    model = quantized_model("4g64")
    targets = list_targets(model)
    table = table_for(targets, {DOWN: 0.08})
    probes = tuple(
        Probe(path=p.path, choice=Choice.parse("3g64"), divergence=p.divergence) for p in table.probes
    )
    ranks = plan_ranks(model, AdapterOptions(), table=type(table)(**{**_fields(table), "probes": probes}))
    assert ranks.sensitivities[DOWN] == pytest.approx(0.08 / 4)  # a bit more, a quarter of the error
    units = tuple(
        type(u)(**{**_fields(u), "paths": (DOWN, V)}) if u.path == DOWN else u
        for u in table.units
        if u.path != V
    )
    shared = plan_ranks(model, AdapterOptions(), table=type(table)(**{**_fields(table), "units": units}))
    assert shared.sensitivities[DOWN] == shared.sensitivities[V] == pytest.approx(0.04)


def test_without_a_measurement_the_rank_is_constant_and_says_why() -> None:
    model = quantized_model("4g64")
    ranks = plan_ranks(model, AdapterOptions(rank=5))
    assert ranks.scaling == "constant"
    assert set(ranks.ranks.values()) == {5}
    assert any("optiq measure" in note for note in ranks.notes)
    with pytest.raises(UsageError, match="--rank-scaling by_sensitivity: no sensitivity file"):
        plan_ranks(model, AdapterOptions(rank_scaling="by_sensitivity"))
    plain = quantized_model("keep")
    table = table_for(list_targets(plain), {DOWN: 0.1})
    assert plan_ranks(plain, AdapterOptions(), table=table).scaling == "by_sensitivity"
    undoing = plan_ranks(plain, AdapterOptions(init="error"), table=table)
    assert any("not quantized" in note for note in undoing.notes)


def test_no_rank_is_larger_than_the_matrix() -> None:
    model = quantized_model("4g64")
    ranks = plan_ranks(model, AdapterOptions(rank=1024, rank_scaling="constant"))
    assert ranks.ranks[V] == 64
    assert ranks.ranks[DOWN] == 128


def test_targets_patterns_and_blocks_choose_the_modules() -> None:
    model = quantized_model("4g64", QWEN3_MOE)
    experts = plan_ranks(model, AdapterOptions(targets="experts", num_blocks=1))
    assert set(experts.ranks) == {
        f"model.layers.1.mlp.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert experts.num_parameters == 4 * 8 * 3 * (128 + 64)
    some = plan_ranks(model, AdapterOptions(adapt=("q_proj", "*.0.*.up_proj")))
    assert {path.rpartition(".")[2] for path in some.ranks} == {"q_proj", "up_proj"}
    assert len(some.ranks) == 3
    with pytest.raises(UsageError, match="'nothing' matches none of"):
        plan_ranks(model, AdapterOptions(adapt=("nothing",)))
    with pytest.raises(UsageError, match="heads is no group; use some of attention, mlp"):
        plan_ranks(model, AdapterOptions(targets="attention,heads"))
    with pytest.raises(UsageError, match="use attention, experts, router, embeddings"):
        plan_ranks(model, AdapterOptions(targets="mlp"))


def test_a_ceiling_below_the_least_ranks_is_refused() -> None:
    model = quantized_model("4g64", LLAMA)
    table = table_for(list_targets(model), {DOWN: 0.1})
    for scaling in ("constant", "by_bits", "by_sensitivity"):
        with pytest.raises(BudgetInfeasible, match=r"--max-parameters 100 is below rank [12] everywhere"):
            plan_ranks(model, AdapterOptions(rank_scaling=scaling, max_parameters=100), table=table)


def _fields(value: object) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.__struct_fields__}  # type: ignore[attr-defined]
