"""Whatever is measured and asked for, an adapter stays within its ceiling, and spends it."""

from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st
from support_lora import quantized_model, table_for

from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.spectrum import noise_spectrum, shares
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.types.adapter import AdapterOptions

MODEL = quantized_model("4g64")
TARGETS = list_targets(MODEL)
LEAST = {1: sum(t.parameters_per_rank for t in TARGETS), 2: 2 * sum(t.parameters_per_rank for t in TARGETS)}
GROUPS = "attention,mlp,experts,embeddings"


@settings(max_examples=60, deadline=None)
@given(
    harm=st.lists(st.floats(1e-9, 1.0), min_size=len(TARGETS), max_size=len(TARGETS)),
    extra=st.integers(0, 200_000),
    scaling=st.sampled_from(["by_sensitivity", "by_bits", "constant"]),
)
def test_the_ceiling_holds_and_what_is_left_buys_nothing_more(
    harm: list[float], extra: int, scaling: Literal["by_sensitivity", "by_bits", "constant"]
) -> None:
    ceiling = LEAST[2] + extra
    table = table_for(TARGETS, {t.path: value for t, value in zip(TARGETS, harm, strict=True)})
    options = AdapterOptions(rank_scaling=scaling, max_parameters=ceiling, targets=GROUPS)
    ranks = plan_ranks(MODEL, options, table=table)
    assert ranks.num_parameters <= ceiling
    assert all(1 <= ranks.ranks[t.path] <= t.max_rank for t in TARGETS)
    left = ceiling - ranks.num_parameters
    open_targets = [t for t in TARGETS if ranks.ranks[t.path] < t.max_rank]
    if scaling == "by_sensitivity":
        assert all(t.parameters_per_rank > left for t in open_targets)
    else:
        one_more = sum(t.parameters_per_rank for t in open_targets)
        assert not open_targets or left < 2 * one_more


@settings(max_examples=40, deadline=None)
@given(
    harm=st.lists(st.floats(1e-6, 1.0), min_size=len(TARGETS), max_size=len(TARGETS)),
    rank=st.integers(1, 32),
)
def test_no_less_is_gained_than_by_a_constant_rank_but_for_the_last_piece(
    harm: list[float], rank: int
) -> None:
    table = table_for(TARGETS, {t.path: value for t, value in zip(TARGETS, harm, strict=True)})
    ours = plan_ranks(MODEL, AdapterOptions(rank=rank, targets=GROUPS, init="error"), table=table)
    constant = plan_ranks(MODEL, AdapterOptions(rank=rank, targets=GROUPS, rank_scaling="constant"))
    assert ours.num_parameters <= constant.num_parameters
    pieces = {
        t.path: ours.sensitivities[t.path] * shares(noise_spectrum(t.inputs, t.outputs)) for t in TARGETS
    }
    of_constant = sum(pieces[path][:r].sum() for path, r in constant.ranks.items())
    last = max(piece[0] for piece in pieces.values())
    assert sum(ours.gains.values()) >= of_constant - last
