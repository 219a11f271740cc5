"""The rank of every adapted module: by sensitivity, by bits, or the same for all.

Decides from shapes, stored bits and measurements; changes no model. Called by ``optiq lora train`` and by the
extension of ``mlx_lm.lora``.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import mlx.nn as nn
import numpy as np

from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.lora.spectrum import Spectrum, noise_spectrum, shares
from mlx_optiq_ext.lora.targets import select_targets
from mlx_optiq_ext.types.adapter import AdapterOptions, LoraTarget, RankMap, RankScaling
from mlx_optiq_ext.types.quant import Choice, Probe, SensitivityTable

__all__ = ["plan_for", "plan_ranks", "rank_by_bits"]

_BITS_REMARK = (
    "by_bits looks at bits alone: modules with more bits, hence less quantization error of their own, get "
    "more rank; by_sensitivity follows what was measured (docs/lora.md)"
)
_NOISE_REMARK = (
    "no original weights: the spectrum of each error is taken to be that of independent rounding errors of "
    "its shape; --original measures it"
)
_COMMON = Choice.parse("4g64")
"""At which modules are compared."""
_MOST = 4
"""Times the average rank that a module gets at most: its steps grow with its rank."""


def plan_ranks(
    model: nn.Module,
    options: AdapterOptions,
    *,
    table: SensitivityTable | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
) -> RankMap:
    """Decide the rank of every target that the options name: :func:`plan_for` of them.

    Args:
        model: The base, without adapters.
        options: Targets, rank, rule and ceiling.
        table: Sensitivities of the base's original.
        spectra: Measured spectra by path.
    Raises:
        UsageError: The rule lacks what it needs, or no module is named.
        BudgetInfeasible: The ceiling does not hold the least ranks.
    """
    return plan_for(select_targets(model, options), options, table=table, spectra=spectra)


def plan_for(
    targets: tuple[LoraTarget, ...],
    options: AdapterOptions,
    *,
    table: SensitivityTable | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
) -> RankMap:
    """Decide the rank of some modules.

    by_sensitivity spends the parameters of the constant rank (or ``max_parameters``) one rank at a time, each
    where it is estimated to do most per parameter. For an adapter that only learns, that is where the output
    is sensitive to the module: what rank r leaves undone is taken to be sensitivity / (r + 1), which makes
    ranks proportional to √(sensitivity / parameters per rank). For one that starts by undoing the base's
    error (``init`` error), it is what the rank takes of the error's spectrum, beyond half of ``rank``
    everywhere.

    Source: Neyman 1934 (optimal allocation), for the square root.

    Args:
        targets: The modules.
        options: Rank, rule and ceiling.
        table: Sensitivities of the base's original; by_sensitivity needs it.
        spectra: Measured spectra of the errors by path (``residual.measure_spectra``); paths without one get
            that of independent errors.
    Raises:
        UsageError: The rule lacks what it needs.
        BudgetInfeasible: The ceiling does not hold the least ranks.
    """
    undoes = options.init == "error"
    known = {} if table is None else _harm(targets, table) if undoes else _sensitive(targets, table)
    scaling, notes = _scaling(options, table, known)
    if scaling == "by_sensitivity":
        ceiling = options.max_parameters or _flat(targets, options.rank)
        by_path = {target.path: target for target in targets if target.path in known}
        potential: dict[str, Spectrum] = {}
        if undoes:
            potential = {
                path: known[path] * shares(_spectrum(t, spectra or {})) for path, t in by_path.items()
            }
            ranks = _fill(targets, potential, ceiling, options.rank // 2)
        else:
            ranks = _fill(targets, _learning(targets, known, ceiling), ceiling, 1)
        assumed = undoes and not any(path in (spectra or {}) for path in potential)
        return RankMap(
            ranks=ranks,
            targets=targets,
            scaling=scaling,
            rank=options.rank,
            max_parameters=ceiling,
            gains={path: float(gain[: ranks[path]].sum()) for path, gain in potential.items()},
            sensitivities=known,
            notes=(*notes, *((_NOISE_REMARK,) if assumed else ())),
        )
    rule: Callable[[LoraTarget, float], int] = (
        (lambda target, rank: rank_by_bits(target.choice, rank))
        if scaling == "by_bits"
        else (lambda _, rank: max(1, math.floor(rank)))
    )
    rank = _largest(targets, rule, options) if options.max_parameters is not None else float(options.rank)
    return RankMap(
        ranks={target.path: min(rule(target, rank), target.max_rank) for target in targets},
        targets=targets,
        scaling=scaling,
        rank=options.rank,
        max_parameters=options.max_parameters,
        sensitivities=known,
        notes=(*notes, *((_BITS_REMARK,) if scaling == "by_bits" else ())),
    )


def rank_by_bits(choice: Choice | None, rank: float) -> int:
    """The published rule, max(2, ⌈rank · bits / 4⌉); what is not quantized counts as 4 bits."""
    bits = 4 if choice is None else choice.bits
    return max(2, math.ceil(rank * bits / 4))


def _scaling(
    options: AdapterOptions, table: SensitivityTable | None, known: Mapping[str, float]
) -> tuple[RankScaling, tuple[str, ...]]:
    """The rule, and why it is that one where nobody asked for it."""
    wanted = options.rank_scaling
    if wanted not in (None, "by_sensitivity"):
        return wanted, ()
    reason = ""
    if table is None:
        reason = (
            "no sensitivity file of the base is at hand (optiq measure makes one, --sensitivity names it)"
        )
    elif not any(known.values()):
        reason = (
            "the sensitivity file knows nothing of these modules (another model's"
            f"{', or they are not quantized' if options.init == 'error' else ''})"
        )
    if not reason:
        return "by_sensitivity", ()
    if wanted is not None:
        raise UsageError(f"--rank-scaling by_sensitivity: {reason}; use --rank-scaling constant otherwise")
    return "constant", (f"constant rank: {reason}",)


def _harm(targets: Sequence[LoraTarget], table: SensitivityTable) -> dict[str, float]:
    """Divergence that the storage of each target causes, nats per token, as far as the table knows it."""
    quantized = [target for target in targets if target.choice is not None]
    return _at(quantized, table, lambda target: target.choice or _COMMON)


def _sensitive(targets: Sequence[LoraTarget], table: SensitivityTable) -> dict[str, float]:
    """Divergence that one and the same choice would cause in each target: what was spent on bits hides it."""
    return _at(targets, table, lambda _: _COMMON)


def _at(
    targets: Sequence[LoraTarget], table: SensitivityTable, choice_of: Callable[[LoraTarget], Choice]
) -> dict[str, float]:
    """Divergence by path at a choice of each; a unit's is shared by its paths."""
    probes: dict[str, list[Probe]] = {}
    for probe in table.probes:
        if probe.choice.mode != "keep":
            probes.setdefault(probe.path, []).append(probe)
    units = {path: unit for unit in table.units for path in unit.paths if unit.path in probes}
    return {
        target.path: _divergence(probes[unit.path], choice_of(target)) / len(unit.paths)
        for target in targets
        if (unit := units.get(target.path)) is not None
    }


def _divergence(probes: Sequence[Probe], choice: Choice) -> float:
    """Of a choice: measured, or that of the nearest one with a quarter of the error per bit."""
    nearest = min(probes, key=lambda p: (p.choice != choice, abs(p.choice.bpw() - choice.bpw()), p.choice))
    between = 0.0 if nearest.choice == choice else choice.bpw() - nearest.choice.bpw()
    return float(max(nearest.divergence, 0.0) * 4.0**-between)


def _learning(
    targets: Sequence[LoraTarget], sensitive: Mapping[str, float], ceiling: int
) -> dict[str, Spectrum]:
    """What each rank of each target is worth to training; a target that was not measured is a typical one."""
    typical = median(sensitive.values())
    most = math.ceil(_MOST * ceiling / _flat(targets, 1))
    worth = {}
    for target in targets:
        rank = np.arange(1, min(most, target.max_rank) + 1)
        worth[target.path] = sensitive.get(target.path, typical) / (rank * (rank + 1))
    return worth


def _spectrum(target: LoraTarget, spectra: Mapping[str, Spectrum]) -> Spectrum:
    found = spectra.get(target.path)
    return noise_spectrum(target.inputs, target.outputs) if found is None else found


def _fill(
    targets: Sequence[LoraTarget], potential: Mapping[str, Spectrum], ceiling: int, least: int
) -> dict[str, int]:
    """Greedy over ranks beyond ``least``, which is exact up to the last one: what each removes only falls.

    Where the ceiling does not hold ``least`` everywhere, the largest rank that it holds takes its place.
    """
    if _flat(targets, 1) > ceiling:
        raise _too_small(ceiling, _flat(targets, 1), 1)
    while least > 1 and _flat(targets, least) > ceiling:
        least -= 1
    ranks = {target.path: max(1, min(least, target.max_rank)) for target in targets}
    left = ceiling - sum(ranks[target.path] * target.parameters_per_rank for target in targets)
    by_path = {target.path: target for target in targets}
    heap: list[tuple[float, int, str]] = []

    def offer(order: int, path: str) -> None:
        target, rank = by_path[path], ranks[path]
        if rank < min(target.max_rank, len(potential[path])) and potential[path][rank] > 0:
            heapq.heappush(heap, (-float(potential[path][rank]) / target.parameters_per_rank, order, path))

    for order, path in enumerate(potential):
        offer(order, path)
    while heap:
        _, order, path = heapq.heappop(heap)
        cost = by_path[path].parameters_per_rank
        if cost <= left:
            left -= cost
            ranks[path] += 1
            offer(order, path)
    return ranks


def _flat(targets: Sequence[LoraTarget], rank: int) -> int:
    """Parameters of one rank for all."""
    return _total(targets, lambda _: rank)


def _total(targets: Sequence[LoraTarget], rank_of: Callable[[LoraTarget], int]) -> int:
    return sum(min(rank_of(target), target.max_rank) * target.parameters_per_rank for target in targets)


def _largest(
    targets: Sequence[LoraTarget], rule: Callable[[LoraTarget, float], int], options: AdapterOptions
) -> float:
    """The largest rank at which a rule keeps the ceiling."""
    ceiling = options.max_parameters
    assert ceiling is not None
    low, high = 0.0, 2.0 * max(target.max_rank for target in targets) + 4.0
    least = _total(targets, lambda target: rule(target, low))
    if least > ceiling:
        raise _too_small(ceiling, least, min(rule(target, low) for target in targets))
    for _ in range(60):
        middle = (low + high) / 2
        fits = _total(targets, lambda target: rule(target, middle)) <= ceiling  # noqa: B023 - called at once
        low, high = (middle, high) if fits else (low, middle)
    return low


def _too_small(ceiling: int, least: int, rank: int) -> BudgetInfeasible:
    return BudgetInfeasible(
        f"--max-parameters {ceiling:,} is below rank {rank} everywhere ({least:,}); raise it, or adapt fewer "
        "modules with --targets, --adapt or --num-blocks"
    )
