"""The budget of a measured model as the slider moves it: range, allocation, comparison, curve.

Knows the sensitivity table and no widget; every function is plain and quick (an allocation of a large model
takes a tenth of a second). Called by the quantize screen.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeAlias

import msgspec

from mlx_optiq_ext.allocate.bitmap import divergence_curve
from mlx_optiq_ext.allocate.menu import Menu, build_menus, respect_floor
from mlx_optiq_ext.allocate.prediction import predicted_as
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_ext.types.report import Curve, CurvePoint

__all__ = [
    "BudgetRange",
    "Comparison",
    "Uniform",
    "budget_curve",
    "budget_range",
    "compare",
    "curve_points",
]

STEP = 0.05
_CURVE_POINTS = 24

Points: TypeAlias = tuple[CurvePoint, ...]


class BudgetRange(msgspec.Struct, frozen=True, kw_only=True):
    """Budgets that make a difference, in stored bits per weight."""

    low: float
    """Everything at its cheapest, rounded up to a step."""
    high: float
    """Everything at its costliest, rounded up to a step."""
    step: float = STEP

    def clip(self, bpw: float) -> float:
        """The nearest step within the range."""
        return min(max(round(round(bpw / self.step) * self.step, 4), self.low), self.high)

    @property
    def start(self) -> float:
        """Where a slider begins: five bits, or the nearest."""
        return self.clip(5.0)


class Uniform(msgspec.Struct, frozen=True, kw_only=True):
    """One uniform choice, as predicted."""

    label: str
    bpw: float
    divergence: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Uniform choices beside an allocation."""

    within: Uniform | None
    """The best that the same budget pays."""
    above: Uniform | None
    """The cheapest that it does not."""
    ratio: float | None
    """Divergence of ``within`` over that of the allocation; None where one of them is not predicted."""


def budget_range(table: SensitivityTable, menus: Sequence[Menu] | None = None) -> BudgetRange:
    """From the cheapest to the costliest allocation that floors allow.

    Args:
        table: What was measured.
        menus: Of the table, where they were built already.
    Raises:
        UsageError: A unit was not measured.
    """
    measured = build_menus(table) if menus is None else menus
    menus = [respect_floor(menu, table.float_bits) for menu in measured]
    ends = []
    for pick in (min, max):
        bits = table.fixed_bits + sum(pick(offer.bits for offer in menu.offers) for menu in menus)
        steps = -(-bits // (table.total_numel * STEP))
        ends.append(round(steps * STEP, 4))
    return BudgetRange(low=ends[0], high=ends[1])


def compare(allocation: Allocation) -> Comparison:
    """The uniform choices that stand nearest to an allocation."""
    rows = [Uniform(label=label, bpw=bpw, divergence=kl) for label, bpw, kl in allocation.uniform]
    within = [row for row in rows if row.bpw <= allocation.target_bpw]
    above = [row for row in rows if row.bpw > allocation.target_bpw]
    best = min(within, key=lambda row: (row.divergence, row.bpw), default=None)
    own = allocation.predicted_divergence
    return Comparison(
        within=best,
        above=min(above, key=lambda row: (row.bpw, row.divergence), default=None),
        ratio=best.divergence / own if best is not None and own > 0 and best.divergence > 0 else None,
    )


def curve_points(
    table: SensitivityTable,
    options: AllocateOptions | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Points:
    """The best allocation at budgets over the whole range; none where nothing is predicted.

    Args:
        table: What was measured.
        options: Pins and protection; the target is ignored.
        is_wanted: Asked before every point; the rest is left out where it says no.
    """
    if table.method == "static":
        return ()
    ends = budget_range(table)
    width = (ends.high - ends.low) / (_CURVE_POINTS - 1)
    targets = takewhile(lambda _: is_wanted(), (ends.low + width * index for index in range(_CURVE_POINTS)))
    found = dict(divergence_curve(table, targets, options))
    return tuple(CurvePoint(bpw=bpw, divergence=kl) for bpw, kl in sorted(found.items()) if kl > 0)


def budget_curve(table: SensitivityTable, allocation: Allocation, points: Points) -> Curve | None:
    """Bits against predicted divergence, with what is chosen and uniform choices.

    Args:
        table: Says what predictions assume.
        allocation: The one that is chosen.
        points: From :func:`curve_points`.
    Returns:
        None where nothing is predicted.
    """
    if table.method == "static":
        return None
    own = CurvePoint(bpw=allocation.achieved_bpw, divergence=allocation.predicted_divergence)
    return Curve(
        predicted=points,
        chosen=own if own.divergence > 0 else None,
        uniform=tuple(
            CurvePoint(label=label, bpw=bpw, divergence=kl) for label, bpw, kl in allocation.uniform if kl > 0
        ),
        predicted_as=predicted_as(table.correction),
        note="Raw estimates on calibration text; optiq score measures on held-out text.",
    )
