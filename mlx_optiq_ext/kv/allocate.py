"""Spend a budget of cache bytes over the keys and values of every layer.

Knows the measurements, not the model. Per-layer estimates of a few thousand tokens over-fit, so they are
also shrunk towards what all layers share; which candidate is taken is decided on other text.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from mlx_optiq_ext.allocate.budget import Item, cheapest_cost, solve
from mlx_optiq_ext.errors import BudgetInfeasible
from mlx_optiq_ext.types.kv import KVLayer, KVProbe, KVSensitivity, KVSite, KVTensor, cached_numbers
from mlx_optiq_ext.types.quant import KEEP, Choice

__all__ = [
    "CacheCandidate",
    "Extent",
    "Place",
    "candidates_within",
    "layers_of",
    "stored_bits",
    "uniform_pairs",
]

Place = tuple[str, KVTensor]
"""(site name, "k" or "v")."""

TENSORS: tuple[KVTensor, KVTensor] = ("k", "v")

SHRINKAGE = (0.0, 0.35, 0.7)
"""How far a layer's estimates are moved, on a log scale, towards the mean of all layers."""

PAIR_MARGIN = 3.0
"""Uniform pairs are run that are predicted to diverge at most so many times as much as the best."""


class CacheCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One complete way to store a cache within the budget."""

    label: str
    choices: dict[Place, Choice]
    bits_per_number: float
    predicted: float
    """Summed estimates, nats per token."""
    is_uniform: bool
    """The same choice for all keys, and the same for all values."""


class Extent(NamedTuple):
    """How much a cache holds."""

    context: int
    """Tokens."""
    recent: int = 0
    """Last tokens in full precision besides."""
    first: int = 0
    """First tokens in full precision besides; sliding caches have none."""

    def exact_tokens(self, site: KVSite) -> int:
        """Tokens of one cache that are held in full precision besides."""
        first = self.first if site.window is None else 0
        return min(self.recent + first, site.tokens_held(self.context))


def stored_bits(sites: Sequence[KVSite], choices: Mapping[Place, Choice], extent: Extent) -> int:
    """Bits of a cache, 16-bit scales and tokens in full precision counted; windows count what they hold."""
    total = 0
    for site in sites:
        pair = [(choices[site.name, tensor], site.numel(tensor)) for tensor in TENSORS]
        held = site.tokens_held(extent.context)
        total += sum(choice.stored_bits(numel) * held for choice, numel in pair)
        if any(choice != KEEP for choice, _ in pair):
            total += sum(KEEP.stored_bits(numel) for _, numel in pair) * extent.exact_tokens(site)
    return total


def require_feasible(
    sites: Sequence[KVSite], offered: Mapping[Place, Sequence[Choice]], target_bits: float, extent: Extent
) -> None:
    """Refuse a budget below the cheapest storage; call it before any long work.

    Raises:
        BudgetInfeasible: Even the cheapest choices take more.
    """
    cheapest = {
        (site.name, tensor): min(offered[site.name, tensor], key=lambda c: c.stored_bits(site.numel(tensor)))
        for site in sites
        for tensor in TENSORS
    }
    least, numbers = stored_bits(sites, cheapest, extent), cached_numbers(sites, extent.context)
    if least > math.floor(target_bits * numbers + 1e-6):
        bare = sorted({name for (name, _), row in offered.items() if set(row) == {KEEP}})
        if bare:
            raise BudgetInfeasible(
                f"no candidate group divides the heads of cache {', '.join(bare)}, which stay in full "
                f"precision: {least / numbers:.3f} bits per number at least; offer smaller groups with "
                "--candidate-groups, or raise --target-bits"
            )
        raise BudgetInfeasible(
            f"--target-bits {target_bits:g} is below the cheapest storage of this cache, "
            f"{least / numbers:.3f} bits per number with scales and biases; raise it, or offer larger groups "
            "and fewer bits with --candidate-groups and --candidate-bits, or fewer tokens with --recent"
        )


def candidates_within(table: KVSensitivity, target_bits: float, extent: Extent) -> tuple[CacheCandidate, ...]:
    """Allocations at several shrinkages, then :func:`uniform_pairs`; every one within the budget.

    Args:
        table: What was measured.
        target_bits: Ceiling in stored bits per cached number.
        extent: What the cache holds.
    Raises:
        BudgetInfeasible: Even the cheapest choices take more.
    """
    probes = _by_place(table.probes, table.sites)
    context = extent.context
    budget = math.floor(target_bits * cached_numbers(table.sites, context) + 1e-6)
    places = list(probes)
    held = {site.name: site.tokens_held(context) for site in table.sites}
    costs = {
        place: tuple(
            probe.choice.stored_bits(_numel(table.sites, place)) * held[place[0]] for probe in probes[place]
        )
        for place in places
    }
    offered = {place: [probe.choice for probe in row] for place, row in probes.items()}
    require_feasible(table.sites, offered, target_bits, extent)
    exact = _exact_bits(table.sites, probes, extent)
    found: list[CacheCandidate] = []
    for shrinkage in SHRINKAGE:
        values = _shrunk(probes, shrinkage)
        items = [Item(costs=costs[place], values=values[place]) for place in places]
        picks = solve(items, max(budget - exact, cheapest_cost(items))).picks
        choices = {place: probes[place][pick].choice for place, pick in zip(places, picks, strict=True)}
        if all(choices != other.choices for other in found):
            label = "per layer" if not shrinkage else f"per layer, shrunk {shrinkage:.0%}"
            found.append(_candidate(table, probes, choices, extent, label))
    pairs = uniform_pairs(table, target_bits, extent)
    return (*(c for c in found if all(c.choices != pair.choices for pair in pairs)), *pairs)


def uniform_pairs(table: KVSensitivity, target_bits: float, extent: Extent) -> tuple[CacheCandidate, ...]:
    """Uniform pairs within the budget that may be the best of all, as predicted best first; none may fit.

    Left out are pairs of which another one stores keys and values both at least as finely (bits as many or
    more, groups as small or smaller), and pairs predicted beyond :data:`PAIR_MARGIN` times the best.
    A tensor that a pair's group does not divide, or whose only choice is keep, is kept.
    """
    probes = _by_place(table.probes, table.sites)
    budget = target_bits * cached_numbers(table.sites, extent.context) + 1e-6
    offered = sorted({probe.choice for probe in table.probes} - {KEEP})
    fitting = {}
    for pair in itertools.product(offered, offered):
        choices = {place: _nearest(probes[place], pair[TENSORS.index(place[1])]) for place in probes}
        if stored_bits(table.sites, choices, extent) <= budget:
            fitting[pair] = choices
    found = [
        _candidate(table, probes, choices, extent, f"uniform K {k.label} V {v.label}", is_uniform=True)
        for (k, v), choices in fitting.items()
        if not any(other != (k, v) and _is_finer(other, (k, v)) for other in fitting)
    ]
    most = PAIR_MARGIN * min((candidate.predicted for candidate in found), default=0.0)
    return tuple(sorted((c for c in found if c.predicted <= most), key=lambda c: c.predicted))


def _is_finer(pair: tuple[Choice, Choice], than: tuple[Choice, Choice]) -> bool:
    return all(
        one.bits >= other.bits and one.group_size <= other.group_size
        for one, other in zip(pair, than, strict=True)
    )


def layers_of(table: KVSensitivity, choices: Mapping[Place, Choice]) -> tuple[KVLayer, ...]:
    """Configuration of every cache for one candidate's choices."""
    means = table.key_means or ("",) * len(table.sites)
    return tuple(
        KVLayer(
            index=site.index,
            member=site.member,
            layer=site.layer,
            k=choices[site.name, "k"],
            v=choices[site.name, "v"],
            key_mean=mean if choices[site.name, "k"] != KEEP else "",
            values_rotated=site.layer in table.values_rotated,
        )
        for site, mean in zip(table.sites, means, strict=True)
    )


def _candidate(
    table: KVSensitivity,
    probes: Mapping[Place, Sequence[KVProbe]],
    choices: dict[Place, Choice],
    extent: Extent,
    label: str,
    *,
    is_uniform: bool = False,
) -> CacheCandidate:
    predicted = math.fsum(
        next(probe.divergence for probe in probes[place] if probe.choice == choice)
        for place, choice in choices.items()
    )
    return CacheCandidate(
        label=label,
        choices=choices,
        bits_per_number=stored_bits(table.sites, choices, extent)
        / cached_numbers(table.sites, extent.context),
        predicted=predicted,
        is_uniform=is_uniform,
    )


def _by_place(probes: Sequence[KVProbe], sites: Sequence[KVSite]) -> dict[Place, list[KVProbe]]:
    names = {(site.index, site.member): site.name for site in sites}
    found: dict[Place, list[KVProbe]] = {}
    for probe in probes:
        found.setdefault((names[probe.index, probe.member], probe.tensor), []).append(probe)
    return found


def _exact_bits(sites: Sequence[KVSite], probes: Mapping[Place, Sequence[KVProbe]], extent: Extent) -> int:
    """Bits of the tokens in full precision, of every cache that offers more than keep."""
    quantizable = [site for site in sites if any(len(probes[site.name, tensor]) > 1 for tensor in TENSORS)]
    return sum(
        KEEP.stored_bits(site.numel("k") + site.numel("v")) * extent.exact_tokens(site)
        for site in quantizable
    )


def _numel(sites: Sequence[KVSite], place: Place) -> int:
    return next(site.numel(place[1]) for site in sites if site.name == place[0])


def _nearest(probes: Sequence[KVProbe], choice: Choice) -> Choice:
    """The choice itself where it is offered, else keep (offered to every tensor)."""
    return choice if any(probe.choice == choice for probe in probes) else KEEP


def _shrunk(probes: Mapping[Place, Sequence[KVProbe]], shrinkage: float) -> dict[Place, tuple[float, ...]]:
    """Divergences moved towards the geometric mean over layers of the same tensor and choice."""
    logs: dict[tuple[KVTensor, Choice], list[float]] = {}
    for (_, tensor), row in probes.items():
        for probe in row:
            if probe.divergence > 0:
                logs.setdefault((tensor, probe.choice), []).append(math.log(probe.divergence))
    means = {key: sum(values) / len(values) for key, values in logs.items()}
    return {
        place: tuple(
            math.exp((1 - shrinkage) * math.log(p.divergence) + shrinkage * means[place[1], p.choice])
            if p.divergence > 0
            else 0.0
            for p in row
        )
        for place, row in probes.items()
    }
