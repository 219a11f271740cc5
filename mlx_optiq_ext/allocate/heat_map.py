"""Sensitivity table and allocation, or ranks → the grid of blocks × modules that the faces draw.

Knows nothing of colours, files or MLX.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from mlx_optiq_ext.types.quant import Allocation, Choice, Probe, SensitivityTable, Unit
from mlx_optiq_ext.types.report import HeatCell, HeatMap

__all__ = [
    "block_and_role",
    "build_heat_map",
    "module_role",
    "order_modules",
    "rank_heat_map",
    "short_names",
]

_COMMON_PROBE = Choice(bits=4, group_size=64)
_GROUPS = ("attn", "mixer", "ssm", "conv", "router", "gate", "mlp", "feed_forward", "moe", "expert")
_LEAVES = (
    *("qkv_proj", "q_proj", "q_a_proj", "q_b_proj", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "v_proj"),
    *("embed_q", "unembed_out", "in_proj", "o_proj", "out_proj"),
    *("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "fc1", "down_proj", "w2", "fc2"),
)
_RENAMED = {
    **dict.fromkeys(("self_attn", "attention", "mlp", "feed_forward", "block_sparse_moe"), ""),
    "switch_mlp": "experts",
    "shared_expert": "shared",
    "shared_experts": "shared",
    "shared_expert_gate": "shared.gate",
    "linear_attn": "linear",
    "gate": "router",
}


def build_heat_map(table: SensitivityTable | None, allocation: Allocation | None) -> HeatMap | None:
    """Lay every module out by block and role.

    Args:
        table: Gives sensitivities, sizes and roles.
        allocation: Gives the chosen bits. Without a table, roles come from the paths alone.
    Returns:
        None where neither is known.
    """
    if table is not None:
        units, probes = table.units, table.probes
    elif allocation is not None:
        units, probes = _units_of_paths(allocation.bit_map.choices), ()
    else:
        return None
    probe = _common_choice(probes)
    by_unit: dict[str, list[Probe]] = {}
    for entry in probes:
        by_unit.setdefault(entry.path, []).append(entry)
    choices: Mapping[str, Choice] = allocation.bit_map.choices if allocation else {}
    pinned = {pin.path for pin in allocation.pins} if allocation else set()
    inside: list[tuple[str, HeatCell]] = []
    outside: list[HeatCell] = []
    for unit in units:
        measured = by_unit.get(unit.path, [])
        for path in unit.paths:
            cell = _cell(unit, path, choices.get(path), measured, probe, bool(pinned & set(unit.paths)))
            if unit.block is None:
                outside.append(cell)
            else:
                inside.append((module_role(unit, path), cell))
    modules = order_modules([role for role, _ in inside])
    row_of = {role: index for index, role in enumerate(modules)}
    return HeatMap(
        modules=modules,
        labels=short_names(modules),
        blocks=tuple(sorted({cell.block for _, cell in inside if cell.block is not None})),
        cells=tuple(msgspec.structs.replace(cell, row=row_of[role]) for role, cell in inside),
        outside=tuple(msgspec.structs.replace(cell, row=index) for index, cell in enumerate(outside)),
        probe=probe.label if probe else "",
    )


def rank_heat_map(ranks: Mapping[str, int]) -> HeatMap:
    """Lay the ranks of an adapter out by block and role.

    Args:
        ranks: Per path; modules of rank 0 stay empty.
    """
    places = {path: block_and_role(path) for path in ranks}
    modules = order_modules([role for block, role in places.values() if block is not None])
    cells = [
        HeatCell(
            path=path,
            row=modules.index(role) if block is not None else 0,
            block=block,
            sensitivity=float(ranks[path]),
        )
        for path, (block, role) in places.items()
        if ranks[path]
    ]
    return HeatMap(
        title="Rank by block and module",
        modules=modules,
        labels=short_names(modules),
        blocks=tuple(sorted({block for block, _ in places.values() if block is not None})),
        cells=tuple(cell for cell in cells if cell.block is not None),
        outside=tuple(cell for cell in cells if cell.block is None),
    )


def module_role(unit: Unit, path: str) -> str:
    """Role within the block of one of a unit's paths: what follows the prefix that the unit's name shows."""
    if path == unit.path and unit.module:
        return unit.module
    if unit.module and unit.path.endswith("." + unit.module):
        prefix = unit.path[: -len(unit.module)]
        if path.startswith(prefix):
            return path.removeprefix(prefix)
    return block_and_role(path)[1]


def order_modules(roles: Sequence[str]) -> tuple[str, ...]:
    """Distinct roles in the order data flows: attention, router, feed-forward, then unknown ones."""
    first_seen = {role: index for index, role in reversed(list(enumerate(roles)))}

    def rank(role: str) -> tuple[int, str, int, int]:
        parent, _, leaf = role.rpartition(".")
        group = next((i for i, word in enumerate(_GROUPS) if word in (parent or leaf)), len(_GROUPS))
        if leaf in {"gate", "router", "shared_expert_gate"}:
            group = _GROUPS.index("router")
        place = _LEAVES.index(leaf) if leaf in _LEAVES else len(_LEAVES)
        return group, parent, place, first_seen[role]

    return tuple(sorted(first_seen, key=rank))


def short_names(roles: Sequence[str]) -> tuple[str, ...]:
    """Names without the parts that say nothing: ``q_proj``, ``experts.up_proj``; roles stay distinct."""
    short = []
    for role in roles:
        words = [_RENAMED.get(word, word) for word in role.split(".")]
        short.append(".".join(word for word in words if word) or role)
    counts = Counter(short)
    return tuple(name if counts[name] == 1 else role for name, role in zip(short, roles, strict=True))


def block_and_role(path: str) -> tuple[int | None, str]:
    """Block index and role of a dotted path: the first number in it is the block."""
    words = path.split(".")
    for index, word in enumerate(words[:-1]):
        if word.isdigit():
            return int(word), ".".join(words[index + 1 :])
    return None, path


def _cell(
    unit: Unit,
    path: str,
    choice: Choice | None,
    measured: Sequence[Probe],
    probe: Choice | None,
    pinned: bool,
) -> HeatCell:
    nearest = min(measured, key=lambda p: _distance(p.choice, probe)) if measured and probe else None
    chosen = next((p.divergence for p in measured if p.choice == choice), None)
    if choice is not None and choice.mode == "keep":
        chosen = 0.0
    return HeatCell(
        path=path,
        row=0,
        block=unit.block,
        numel=unit.numel // len(unit.paths),
        bits=None if choice is None else choice.bits,
        choice="" if choice is None else choice.label,
        pinned=pinned,
        sensitivity=None if nearest is None else nearest.divergence,
        divergence=chosen,
    )


def _common_choice(probes: Sequence[Probe]) -> Choice | None:
    """The choice most units were probed with; among equals the one nearest to 4 bits in groups of 64."""
    counts = Counter(probe.choice for probe in probes if probe.choice.mode != "keep")
    if not counts:
        return None
    most = max(counts.values())
    return min((c for c, n in counts.items() if n == most), key=lambda c: _distance(c, _COMMON_PROBE))


def _distance(choice: Choice, other: Choice | None) -> tuple[float, str]:
    other = other or _COMMON_PROBE
    if choice == other:
        return -1.0, ""
    return abs(choice.bpw() - other.bpw()), choice.label


def _units_of_paths(choices: Mapping[str, Choice]) -> tuple[Unit, ...]:
    units = []
    for path in choices:
        block, role = block_and_role(path)
        units.append(Unit(paths=(path,), shape=(), numel=0, kind="linear", block=block, module=role))
    return tuple(units)
