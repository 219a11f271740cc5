"""A budget of cache bits: exact, never exceeded, windows counted, and what cannot be had is said."""

import itertools
import math

import numpy as np
import pytest

from mlx_optiq_ext.errors import BudgetInfeasible
from mlx_optiq_ext.kv import allocate
from mlx_optiq_ext.kv.allocate import Extent, candidates_within, layers_of, stored_bits, uniform_pairs
from mlx_optiq_ext.kv.report import UNBOUNDED, context_that_fits
from mlx_optiq_ext.types.kv import KVConfig, KVProbe, KVSensitivity, KVSite
from mlx_optiq_ext.types.quant import KEEP, Choice

CHOICES = (*(Choice(bits=b, group_size=64) for b in (2, 4, 8)), KEEP)
CONTEXT = 1024


def site(index: int, *, heads: int = 2, window: int | None = None) -> KVSite:
    return KVSite(index=index, layer=index, heads=heads, key_dim=64, value_dim=64, window=window)


def table(sites: tuple[KVSite, ...], seed: int = 0, choices: tuple[Choice, ...] = CHOICES) -> KVSensitivity:
    """Random divergences, a quarter of them with every bit more; keys cost ten times what values do."""
    rng = np.random.default_rng(seed)
    probes = []
    for entry in sites:
        for tensor, scale in (("k", 1.0), ("v", 0.1)):
            base = scale * math.exp(rng.normal())
            for choice in choices:
                cost = 0.0 if choice == KEEP else base * 4.0**-choice.bits * rng.uniform(0.7, 1.3)
                probes.append(
                    KVProbe(index=entry.index, tensor=tensor, choice=choice, divergence=cost)  # type: ignore[arg-type]
                )
    return KVSensitivity(lengths=(CONTEXT,), sites=sites, rotate=True, probes=tuple(probes))


def brute_force(measured: KVSensitivity, budget: float) -> float:
    """The least summed divergence of all assignments within the budget."""
    places = [(s.name, t) for s in measured.sites for t in ("k", "v")]
    costs = {(str(p.index), p.tensor, p.choice): p.divergence for p in measured.probes}
    best = math.inf
    for picks in itertools.product(CHOICES, repeat=len(places)):
        choices = dict(zip(places, picks, strict=True))
        if stored_bits(measured.sites, choices, Extent(CONTEXT)) <= budget:  # type: ignore[arg-type]
            best = min(best, sum(costs[name, tensor, c] for (name, tensor), c in choices.items()))
    return best


SITES = (site(0), site(1, heads=1), site(2, window=128))


def numbers(sites: tuple[KVSite, ...]) -> int:
    return sum(128 * s.heads * s.tokens_held(CONTEXT) for s in sites)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [2.6, 3.5, 4.7, 6.0, 9.0])
def test_the_allocation_is_the_best_of_all_and_within_the_budget(seed: int, target: float) -> None:
    measured = table(SITES, seed)
    first = candidates_within(measured, target, Extent(CONTEXT))[0]
    budget = target * numbers(SITES)
    assert first.predicted == pytest.approx(brute_force(measured, budget), rel=1e-9)
    assert stored_bits(SITES, first.choices, Extent(CONTEXT)) <= budget


@pytest.mark.parametrize("target", [2.5, 3.0, 4.5, 5.5, 8.5])
def test_no_candidate_exceeds_the_budget(target: float) -> None:
    for candidate in candidates_within(table(SITES), target, Extent(CONTEXT)):
        assert candidate.bits_per_number <= target + 1e-9
        bits = stored_bits(SITES, candidate.choices, Extent(CONTEXT))
        assert candidate.bits_per_number == pytest.approx(bits / numbers(SITES))


def test_more_budget_is_never_worse() -> None:
    measured = table(SITES)
    found = [candidates_within(measured, target, Extent(CONTEXT))[0] for target in np.arange(2.5, 17, 0.5)]
    assert all(b.predicted <= a.predicted for a, b in itertools.pairwise(found))
    assert found[-1].predicted == 0
    assert set(found[-1].choices.values()) == {KEEP}


def test_sliding_caches_count_their_window_and_no_more() -> None:
    choices = {(s.name, t): CHOICES[1] for s in SITES for t in ("k", "v")}
    bits = 4.5 * 128
    assert stored_bits(SITES, choices, Extent(100)) == bits * 100 * (2 + 1 + 2)  # type: ignore[arg-type]
    assert stored_bits(SITES, choices, Extent(5000)) == bits * (5000 * 3 + 128 * 2)  # type: ignore[arg-type]


def test_a_cache_that_slides_gets_more_bits_than_an_equal_one_that_grows() -> None:
    sites = (site(0), site(1, window=64))
    probes = [
        KVProbe(index=i, tensor=t, choice=c, divergence=0.0 if c == KEEP else 4.0**-c.bits)  # type: ignore[arg-type]
        for i in (0, 1)
        for t in ("k", "v")
        for c in CHOICES
    ]
    measured = KVSensitivity(lengths=(CONTEXT,), sites=sites, rotate=True, probes=tuple(probes))
    choices = candidates_within(measured, 4.8, Extent(CONTEXT))[0].choices
    assert choices["1", "k"].bits > choices["0", "k"].bits
    assert choices["1", "v"].bits > choices["0", "v"].bits


def test_a_tensor_that_can_only_be_kept_is_kept_and_counted() -> None:
    measured = table(SITES)
    only = tuple(p for p in measured.probes if (p.index, p.tensor) != (1, "v") or p.choice == KEEP)
    kept = KVSensitivity(lengths=(CONTEXT,), sites=SITES, rotate=True, probes=only)
    for candidate in candidates_within(kept, 5.5, Extent(CONTEXT)):
        assert candidate.choices["1", "v"] == KEEP
        assert candidate.bits_per_number <= 5.5 + 1e-9


def test_a_target_below_the_cheapest_storage_says_what_that_takes() -> None:
    with pytest.raises(BudgetInfeasible, match=r"--target-bits 2\.4 .* 2\.500 bits per number"):
        candidates_within(table(SITES), 2.4, Extent(CONTEXT))


def test_full_shrinkage_gives_equal_layers_equal_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "SHRINKAGE", (1.0,))
    sites = tuple(site(i) for i in range(4))
    # 4.5 and 8.5 bits are what all layers can have alike; between them the rest is spent unevenly.
    for target in (4.5, 8.5):
        first = candidates_within(table(sites), target, Extent(CONTEXT))[0]
        for tensor in ("k", "v"):
            assert len({first.choices[s.name, tensor] for s in sites}) == 1  # type: ignore[index]


def test_uniform_pairs_come_in_the_order_of_their_prediction() -> None:
    measured = table(SITES)
    pairs = uniform_pairs(measured, 6.5, Extent(CONTEXT))
    assert all(pair.is_uniform and pair.bits_per_number <= 6.5 for pair in pairs)
    assert [p.predicted for p in pairs] == sorted(p.predicted for p in pairs)
    for pair in pairs:
        for tensor in ("k", "v"):
            assert len({pair.choices[s.name, tensor] for s in SITES}) == 1  # type: ignore[index]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [2.5, 3.5, 5.5, 6.5, 12.5])
def test_pairs_left_out_are_coarser_than_another_or_predicted_far_worse(seed: int, target: float) -> None:
    sites = tuple(site(i) for i in range(3))
    choices = (*(Choice(bits=b, group_size=g) for b in (2, 3, 4, 6, 8) for g in (32, 64)), KEEP)
    measured = table(sites, seed, choices)
    found = uniform_pairs(measured, target, Extent(CONTEXT))
    costs = {(p.index, p.tensor, p.choice): p.divergence for p in measured.probes}
    pairs = list(itertools.product(choices[:-1], choices[:-1]))
    fitting = [pair for pair in pairs if (pair[0].bpw() + pair[1].bpw()) / 2 <= target]
    shown = [(pair.choices["0", "k"], pair.choices["0", "v"]) for pair in found]
    assert set(shown) <= set(fitting)
    for keys, values in set(fitting) - set(shown):
        predicted = sum(costs[s.index, "k", keys] + costs[s.index, "v", values] for s in sites)
        is_coarser = any(
            k.bits >= keys.bits
            and v.bits >= values.bits
            and k.group_size <= keys.group_size
            and v.group_size <= values.group_size
            for k, v in set(fitting) - {(keys, values)}
        )
        assert is_coarser or predicted > allocate.PAIR_MARGIN * found[0].predicted


def test_layers_carry_their_choices_and_means_of_packed_keys_only() -> None:
    measured = table(SITES)
    measured = KVSensitivity(
        lengths=(CONTEXT,), sites=SITES, rotate=True, probes=measured.probes, key_means=("a", "b", "c")
    )
    choices = {(s.name, t): CHOICES[1] for s in SITES for t in ("k", "v")} | {("1", "k"): KEEP}
    layers = layers_of(measured, choices)  # type: ignore[arg-type]
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert [layer.key_mean for layer in layers] == ["a", "", "c"]
    assert [layer.k for layer in layers] == [CHOICES[1], KEEP, CHOICES[1]]


def test_tokens_in_full_precision_are_paid_from_the_budget() -> None:
    measured, extent = table(SITES), Extent(CONTEXT, recent=64, first=4)
    budget = 5.5 * sum((site.numel("k") + site.numel("v")) * site.tokens_held(CONTEXT) for site in SITES)
    for candidate in candidates_within(measured, 5.5, extent):
        packed = stored_bits(SITES, candidate.choices, Extent(CONTEXT))
        exact = sum(
            16 * (site.numel("k") + site.numel("v")) * (64 if site.window else 68)
            for site in SITES
            if candidate.choices[site.name, "k"] != KEEP or candidate.choices[site.name, "v"] != KEEP
        )
        assert stored_bits(SITES, candidate.choices, extent) == packed + exact <= budget


def test_the_context_that_fits_pays_for_what_sliding_buffers_hold_beyond_their_window() -> None:
    slides = (site(0, window=128),)
    config = KVConfig(layers=())
    per_token = 2 * KEEP.stored_bits(slides[0].numel("k")) // 8
    held = per_token * (128 + 16)
    assert context_that_fits(config, slides, held) == UNBOUNDED
    assert context_that_fits(config, slides, held - 1) == 143
    assert context_that_fits(config, (site(0),), held) == 144
