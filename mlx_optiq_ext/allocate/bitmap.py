"""Sensitivity table + budget + pins → bit map.

Reads the table, never the model, so any number of budgets can be tried without measuring again. Called by
``optiq allocate`` and by the conversion.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from mlx_optiq_ext.allocate.budget import Item, Solution, lower_bound, solve
from mlx_optiq_ext.allocate.menu import (
    Menu,
    Offer,
    build_menus,
    nearest_offer,
    respect_floor,
    widest_quantized,
    with_choice,
)
from mlx_optiq_ext.allocate.pins import ForcedChoice, edge_pins, match_pins, parse_pin
from mlx_optiq_ext.allocate.size import Budget, budget_from, format_nbytes
from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, BitMap, Choice, Pin, SensitivityTable

__all__ = ["allocate", "divergence_curve", "price_bit_map"]


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an allocation needs except its budget."""

    table: SensitivityTable
    options: AllocateOptions
    free: tuple[Menu, ...]
    """Every measured choice, plus the forced ones."""
    floored: tuple[Menu, ...]
    """Floors respected, nothing forced: what uniform choices are made from."""
    menus: tuple[Menu, ...]
    """What may really be chosen: floors and pins applied."""
    forced: dict[str, ForcedChoice]


def allocate(
    table: SensitivityTable, options: AllocateOptions, *, kv_bytes_per_token: int | None = None
) -> Allocation:
    """Choose for every unit so that the summed predicted divergence is least within the budget.

    The budget covers all stored bits: units with their scales and biases, and ``table.fixed_bits``. It is
    a ceiling; what the best choice leaves is spent where it predicts no loss. Floors (a model's own
    predicate, eight bits for routers) hold unless a pin says otherwise; ``--pin`` wins over ``--protect``.

    Args:
        kv_bytes_per_token: Mean KV cache bytes per token at ``options.context``; needed for ``--fit``.
    Returns:
        ``predicted_stderr`` adds the spreads of all units up (they share the same windows, so they are
        not independent); it holds no error of the estimate itself. Each pin costs, at the price of a bit
        around this budget, what choosing it in place of the allocator's own choice adds.
    Raises:
        UsageError: No or several targets, a pin that matches nothing, a unit without measurement.
        BudgetInfeasible: Even the cheapest choices exceed the budget.
    """
    plan = _plan(table, options)
    return _allocate_within(plan, budget_from(table, options, kv_bytes_per_token=kv_bytes_per_token))


def price_bit_map(table: SensitivityTable, bit_map: BitMap) -> Allocation:
    """What a bit map made elsewhere stores and is predicted to cost; nothing is chosen, no floor applied.

    Raises:
        UsageError: Its paths are not the table's, paths that are stored alike differ, or a unit has a choice
            that its shape does not take or that nothing measured bounds.
    """
    paths = {path for unit in table.units for path in unit.paths}
    strangers = sorted(paths ^ bit_map.choices.keys())
    if strangers:
        raise UsageError(
            f"bit map and sensitivity file are not of the same tensors: only one of them has {strangers[0]}"
            + (f" and {len(strangers) - 1} more" if strangers[1:] else "")
        )
    plan = _plan(table, AllocateOptions())
    offers = [_given_offer(menu, bit_map, table.float_bits) for menu in plan.free]
    bound = lower_bound(_items(plan.free, speed_weight=0.0), sum(offer.bits for offer in offers))
    allocation = _describe(plan, offers)
    return replace(
        allocation,
        lower_bound=min(max(bound, 0.0), allocation.predicted_divergence),
        solver="given",
        uniform=_uniform_rows(plan),
    )


def divergence_curve(
    table: SensitivityTable, targets: Iterable[float], options: AllocateOptions | None = None
) -> list[tuple[float, float]]:
    """(achieved bpw, predicted divergence) of the allocation for every target in bpw that is feasible.

    Args:
        options: Pins, protection and solver; its own target is ignored.
    """
    plan = _plan(table, options or AllocateOptions())
    points = []
    for target in targets:
        wanted = AllocateOptions(target_bpw=target)
        try:
            allocation = _allocate_within(plan, budget_from(table, wanted), compare=False)
        except BudgetInfeasible:
            continue
        points.append((allocation.achieved_bpw, allocation.predicted_divergence))
    return points


def _plan(table: SensitivityTable, options: AllocateOptions) -> _Plan:
    """Build the menus and apply floors and pins."""
    measured = build_menus(table)
    floored = tuple(respect_floor(menu, table.float_bits) for menu in measured)
    forced: dict[str, ForcedChoice] = {}
    if options.protect == "edges":
        forced = edge_pins(table.units, [widest_quantized(menu) for menu in floored])
    forced |= match_pins([parse_pin(text) for text in options.pin], table.units)
    free, menus = [], []
    for menu, bounded in zip(measured, floored, strict=True):
        pin = forced.get(menu.unit.path)
        wanted = pin.choice if pin else bounded.offers[0].choice
        # What is forced must be on the free menu too, so that the free answer is never the worse one.
        whole = with_choice(menu, wanted, table.float_bits)
        free.append(whole)
        menus.append(replace(bounded, offers=(whole.offers[whole.index_of(wanted)],)) if pin else bounded)
    return _Plan(
        table=table, options=options, free=tuple(free), floored=floored, menus=tuple(menus), forced=forced
    )


def _given_offer(menu: Menu, bit_map: BitMap, float_bits: int) -> Offer:
    """What a unit becomes by a bit map."""
    given = {path: bit_map.choices[path] for path in menu.unit.paths}
    choice = given[menu.unit.path]
    other = next((path for path in given if given[path] != choice), None)
    if other is not None:
        raise UsageError(
            f"{menu.unit.path} and {other} are stored alike, and the bit map has {choice.label} and "
            f"{given[other].label}; give both the same"
        )
    if menu.unit.shape and not choice.fits(menu.unit.shape[-1]):
        raise UsageError(
            f"{menu.unit.path} of shape {menu.unit.shape} cannot be stored as {choice.label}; choose a group "
            "that divides its last axis, or keep"
        )
    menu = with_choice(menu, choice, float_bits)
    return menu.offers[menu.index_of(choice)]


def _allocate_within(plan: _Plan, budget: Budget, *, compare: bool = True) -> Allocation:
    """Solve for one budget; without ``compare``, leave out uniform rows and the cost of pins."""
    table = plan.table
    left = budget.bits - table.fixed_bits
    _check_feasible(plan, budget)
    solution = _solve(plan, plan.menus, left)
    offers = [menu.offers[pick] for menu, pick in zip(plan.menus, solution.picks, strict=True)]
    allocation = _describe(plan, offers)
    bound = solution.lower_bound
    if plan.options.speed_weight > 0:
        bound = lower_bound(_items(plan.menus, speed_weight=0.0), left)
    allocation = replace(
        allocation,
        target_bpw=budget.bits / table.total_numel,
        budget=budget.origin,
        lower_bound=min(max(bound, 0.0), allocation.predicted_divergence),
        solver=plan.options.solver,
    )
    if not compare:
        return allocation
    return replace(allocation, pins=_priced_pins(plan, solution, left), uniform=_uniform_rows(plan))


def _solve(plan: _Plan, menus: Sequence[Menu], budget_bits: int) -> Solution:
    """Run the solver, never worse than a uniform choice that fits."""
    float_bits = plan.table.float_bits
    uniform = [[nearest_offer(menu, choice, float_bits) for menu in menus] for choice in _all_choices(menus)]
    items = _items(menus, speed_weight=plan.options.speed_weight)
    return solve(items, budget_bits, solver=plan.options.solver, candidates=uniform)


def _items(menus: Sequence[Menu], *, speed_weight: float) -> list[Item]:
    """Menus as knapsack items; the penalty is ``speed_weight`` × bits read per token and active weight."""
    active = sum(menu.unit.active_share * menu.unit.numel for menu in menus)
    rate = speed_weight / active if active else 0.0
    return [
        Item(
            costs=tuple(offer.bits for offer in menu.offers),
            values=tuple(offer.divergence for offer in menu.offers),
            penalties=tuple(rate * menu.unit.active_share * offer.bits for offer in menu.offers)
            if rate
            else (),
        )
        for menu in menus
    ]


def _all_choices(menus: Sequence[Menu]) -> list[Choice]:
    """Every choice on any menu, by stored bits per weight."""
    found = {offer.choice for menu in menus for offer in menu.offers}
    return sorted(found, key=lambda choice: (choice.bpw(), choice))


def _describe(plan: _Plan, offers: Sequence[Offer]) -> Allocation:
    """Add up one offer per unit."""
    table = plan.table
    chosen = {
        path: offer.choice for unit, offer in zip(table.units, offers, strict=True) for path in unit.paths
    }
    bits = table.fixed_bits + sum(offer.bits for offer in offers)
    by_domain = {
        name: sum(offer.by_domain[index] if offer.by_domain else offer.divergence for offer in offers)
        for index, name in enumerate(table.domains)
    }
    worst = max(by_domain, key=lambda name: by_domain[name], default="")
    return Allocation(
        bit_map=BitMap(choices=chosen),
        target_bpw=bits / table.total_numel,
        achieved_bpw=bits / table.total_numel,
        nbytes=-(-bits // 8),
        predicted_divergence=sum(offer.divergence for offer in offers),
        predicted_stderr=sum(offer.stderr for offer in offers),
        worst_domain=worst,
        worst_domain_divergence=by_domain.get(worst, 0.0),
        correction=table.correction,
    )


def _priced_pins(plan: _Plan, solution: Solution, budget_bits: int) -> tuple[Pin, ...]:
    """Every forced choice, and every floor that held the allocator back, with its cost.

    What all of them cost together is the difference of two allocations; each bears its share of it in
    proportion to its own cost at the price of a bit.
    """
    free = _solve(plan, plan.free, budget_bits)
    items = _items(plan.free, speed_weight=plan.options.speed_weight)
    pins: list[Pin] = []
    costs: list[float] = []
    for menu, bounded, item, own, pick in zip(
        plan.free, plan.menus, items, free.picks, solution.picks, strict=True
    ):
        chosen = bounded.offers[pick]
        forced = plan.forced.get(menu.unit.path)
        is_held_back = all(offer.choice != menu.offers[own].choice for offer in bounded.offers)
        if forced is None and not is_held_back:
            continue
        extra_bits = chosen.bits - menu.offers[own].bits
        change = item.objective(menu.index_of(chosen.choice)) - item.objective(own)
        costs.append(max(change + free.price * extra_bits, 0.0))
        reason = forced.reason if forced else _floor_reason(menu)
        pins.append(Pin(path=menu.unit.path, choice=chosen.choice, reason=reason, cost_bits=extra_bits))
    total = max(solution.objective - free.objective, 0.0)
    # With few units a pin can be free at the price of a bit and yet push others down: share by bits then.
    weights = costs if sum(costs) > 0 else [abs(pin.cost_bits) + 1 for pin in pins]
    return tuple(
        replace(pin, cost_divergence=total * weight / sum(weights))
        for pin, weight in zip(pins, weights, strict=True)
    )


def _floor_reason(menu: Menu) -> str:
    """Why a floor holds for this unit."""
    kind = "router: its error picks other experts" if menu.unit.kind == "router" else "minimum of the family"
    return f"floor ({kind})"


def _uniform_rows(plan: _Plan) -> tuple[tuple[str, float, float], ...]:
    """(label, bpw, predicted divergence) of every uniform choice, floors respected, pins ignored."""
    rows = []
    for choice in _all_choices(plan.floored):
        offers = [menu.offers[nearest_offer(menu, choice, plan.table.float_bits)] for menu in plan.floored]
        described = _describe(plan, offers)
        rows.append((choice.label, described.achieved_bpw, described.predicted_divergence))
    return tuple(sorted(rows, key=lambda row: (row[1], row[0])))


def _check_feasible(plan: _Plan, budget: Budget) -> None:
    """Refuse a budget below the cheapest allocation, saying what holds it up."""
    table = plan.table
    cheapest = table.fixed_bits + sum(menu.offers[0].bits for menu in plan.menus)
    if cheapest <= budget.bits:
        return
    need = cheapest / table.total_numel
    advice = [f"raise the target to {need + 0.005:.2f} bpw ({format_nbytes(cheapest / 8)})"]
    forced_bits = cheapest - table.fixed_bits - sum(menu.offers[0].bits for menu in plan.floored)
    if forced_bits > 0:
        advice.append(f"drop --pin or --protect ({forced_bits / table.total_numel:.2f} bpw)")
    least = min((menu.offers[0].choice for menu in plan.menus), key=lambda choice: choice.bits)
    if least.bits > 2:
        advice.append(f"measure with fewer bits than {least.label} (--candidate-bits)")
    raise BudgetInfeasible(
        f"{budget.origin} allows {budget.bits / table.total_numel:.3f} bpw, below the cheapest allocation "
        f"({need:.3f} bpw, {table.fixed_bits / table.total_numel:.3f} of it not quantizable): "
        f"{'; or '.join(advice)}"
    )
