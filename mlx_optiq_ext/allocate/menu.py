"""What each unit may become: its measured choices with their stored bits and divergences.

Knows the sensitivity table; decides nothing about budgets. Called by ``bitmap``.
"""

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.quant import KEEP, Choice, Probe, SensitivityTable, Unit

__all__ = [
    "Menu",
    "Offer",
    "build_menus",
    "nearest_offer",
    "respect_floor",
    "widest_quantized",
    "with_choice",
]

_ROUTER_FLOOR = Choice(bits=8, group_size=64)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of one unit."""

    choice: Choice
    bits: int
    """Stored bits of the whole unit."""
    divergence: float
    """Predicted divergence, nats per token, smoothed along the bit widths (see :func:`build_menus`)."""
    stderr: float = 0.0
    """Of ``divergence`` over windows, nats per token."""
    by_domain: tuple[float, ...] = ()
    """As measured; empty: like ``divergence`` in every domain."""


class Menu(msgspec.Struct, frozen=True, kw_only=True):
    """The offers of one unit, in ascending order of stored bits."""

    unit: Unit
    offers: tuple[Offer, ...]

    def index_of(self, choice: Choice) -> int:
        """Position of a choice that is on the menu."""
        return next(index for index, offer in enumerate(self.offers) if offer.choice == choice)


def build_menus(table: SensitivityTable) -> tuple[Menu, ...]:
    """Collect the measured choices of every unit.

    An exact probe replaces an estimate of the same choice. Measured divergences carry noise, and noise can
    make five bits look worse than four: within one mode and group size they are replaced by the nearest
    sequence that never rises with the bits (weighted by 1/stderr² where every one has an error). So a
    lucky probe attracts no bits, and no choice looks like a loss for having more of them. Leaving a unit
    as it is costs no divergence and needs no probe.

    Raises:
        UsageError: A unit has no usable choice.
    """
    probes: dict[tuple[str, Choice], Probe] = {}
    for probe in table.probes:
        known = probes.get((probe.path, probe.choice))
        if known is None or probe.exact or not known.exact:
            probes[probe.path, probe.choice] = probe
    probed: dict[str, list[Choice]] = {}
    for path, choice in probes:
        probed.setdefault(path, []).append(choice)
    menus = []
    for unit in table.units:
        possible = unit.choices or probed.get(unit.path, ())
        measured = [probes[unit.path, choice] for choice in possible if (unit.path, choice) in probes]
        smooth = _smooth([probe for probe in measured if probe.choice.mode != "keep"])
        offers = [
            _offer(unit, probe, smooth[probe.choice], table.float_bits)
            for probe in measured
            if probe.choice != KEEP
        ]
        if KEEP in possible:
            offers.append(
                Offer(choice=KEEP, bits=KEEP.stored_bits(unit.numel, table.float_bits), divergence=0.0)
            )
        if not offers:
            raise UsageError(
                f"the sensitivity table has no measurement for {unit.path}; measure again, with choices that "
                f"its shape {unit.shape} takes, or add keep to --candidate-bits"
            )
        menus.append(Menu(unit=unit, offers=_ordered(offers)))
    return tuple(menus)


def respect_floor(menu: Menu, float_bits: int) -> Menu:
    """Remove what lies below the model's own minimum, or below eight bits for a router.

    Where nothing measured remains, the minimum itself takes its place, or keeping the tensor where its
    shape does not take that.
    """
    floor = _floor_of(menu.unit)
    if floor is None:
        return menu
    kept = [offer for offer in menu.offers if not _is_below(offer.choice, floor, float_bits)]
    if kept:
        return replace(menu, offers=tuple(kept))
    fits = not menu.unit.shape or floor.fits(menu.unit.shape[-1])
    wider = with_choice(menu, floor if fits else KEEP, float_bits)
    return replace(menu, offers=(wider.offers[wider.index_of(floor if fits else KEEP)],))


def with_choice(menu: Menu, choice: Choice, float_bits: int) -> Menu:
    """The menu with ``choice`` on it.

    A choice that was not measured gets the divergence of the widest cheaper one, which bounds it from
    above.

    Raises:
        UsageError: It was not measured and nothing cheaper was, so that nothing bounds its cost.
    """
    if any(offer.choice == choice for offer in menu.offers):
        return menu
    bits = choice.stored_bits(menu.unit.numel, float_bits)
    cheaper = [offer for offer in menu.offers if offer.bits <= bits]
    if choice.mode == "keep":
        added = Offer(choice=choice, bits=bits, divergence=0.0)
    elif cheaper:
        added = replace(cheaper[-1], choice=choice, bits=bits)
    else:
        known = ", ".join(offer.choice.label for offer in menu.offers)
        raise UsageError(
            f"what {choice.label} costs {menu.unit.path} is not known, it was measured as {known} only: pin "
            f"it to one of these, or measure again with {choice.label} added to --candidate-bits"
        )
    return replace(menu, offers=_ordered([*menu.offers, added]))


def nearest_offer(menu: Menu, choice: Choice, float_bits: int) -> int:
    """Position of ``choice``, or of the offer nearest to it in stored bits (the wider of two as near)."""
    bits = choice.stored_bits(menu.unit.numel, float_bits)

    def distance(index: int) -> tuple[bool, int, int]:
        offer = menu.offers[index]
        return offer.choice != choice, abs(offer.bits - bits), -offer.bits

    return min(range(len(menu.offers)), key=distance)


def widest_quantized(menu: Menu) -> Choice:
    """The offer with most stored bits that is quantized; keep where there is no other."""
    quantized = [offer.choice for offer in menu.offers if offer.choice.mode != "keep"]
    return quantized[-1] if quantized else KEEP


def _floor_of(unit: Unit) -> Choice | None:
    """The unit's own floor; eight bits for a router without one."""
    return unit.floor or (_ROUTER_FLOOR if unit.kind == "router" else None)


def _is_below(choice: Choice, floor: Choice, float_bits: int) -> bool:
    """Whether a choice has fewer bits per code, or fewer stored bits, than the floor."""
    return choice.bits < floor.bits or choice.bpw(float_bits) < floor.bpw(float_bits)


def _offer(unit: Unit, probe: Probe, divergence: float, float_bits: int) -> Offer:
    return Offer(
        choice=probe.choice,
        bits=probe.choice.stored_bits(unit.numel, float_bits),
        divergence=divergence,
        stderr=probe.stderr,
        by_domain=probe.by_domain,
    )


def _ordered(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    return tuple(sorted(offers, key=lambda offer: (offer.bits, offer.choice)))


def _smooth(probes: Sequence[Probe]) -> dict[Choice, float]:
    """Divergences that do not rise with the bits, per mode and group size, and are never negative."""
    smooth: dict[Choice, float] = {}
    for ladder in sorted({_ladder_of(probe) for probe in probes}):
        rungs = sorted((p for p in probes if _ladder_of(p) == ladder), key=lambda p: p.choice.bits)
        known_errors = all(probe.stderr > 0 for probe in rungs)
        weights = [max(probe.stderr, 1e-30) ** -2 if known_errors else 1.0 for probe in rungs]
        values = _never_rising([max(probe.divergence, 0.0) for probe in rungs], weights)
        smooth.update({probe.choice: value for probe, value in zip(rungs, values, strict=True)})
    return smooth


def _ladder_of(probe: Probe) -> tuple[str, int]:
    """What choices must share to be ordered by their bits."""
    return probe.choice.mode, probe.choice.group_size


def _never_rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Weighted least-squares fit that never rises.

    Source: pool-adjacent-violators, Ayer et al., Annals of Mathematical Statistics 26 (1955).
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] < pool[0]:
            mean, mass, members = pools.pop()
            total = mass + pool[1]
            # A weighted step from one mean, exact where both are equal.
            pool = (mean + (pool[0] - mean) * (pool[1] / total), total, members + pool[2])
        pools.append(pool)
    return [mean for mean, _, members in pools for _ in range(members)]
