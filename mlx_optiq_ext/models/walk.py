"""List what can be quantized in a module tree: units, their blocks, floors and choices.

Knows mlx-lm's module kinds, not its model files; reads family facts from ``families``.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from msgspec.structs import replace

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import (
    experts_per_token,
    find_blocks,
    is_router,
    is_selector,
    is_state_projection,
)
from mlx_optiq_ext.types.quant import AFFINE_GROUPS, KEEP, Choice, Unit, UnitKind

__all__ = ["Quantizable", "fixed_bits", "get_module", "list_units", "quantizable_modules", "total_numel"]

_EIGHT_BITS = Choice(bits=8, group_size=64)


class Quantizable(nn.Module):
    """What every module that mlx can quantize has; for annotations only."""

    weight: mx.array
    """(O, I), or (E, O, I) for experts and heads."""


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Module at a dotted path."""
    node: Any = model
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else getattr(node, part)
    return cast(nn.Module, node)


def quantizable_modules(model: nn.Module) -> dict[str, Quantizable]:
    """Every module with ``to_quantized``, by path, in the order of the tree.

    Raises:
        UnsupportedModel: The model is quantized already, or nothing can be quantized.
    """
    found: dict[str, Quantizable] = {}
    for path, module in sorted(model.named_modules(), key=lambda item: _natural(item[0])):
        if "scales" in module and "weight" in module:
            raise UnsupportedModel(
                f"{path} is quantized already: start from the original weights, or undo it with "
                "`mlx_lm.convert --dequantize` (which does not bring the lost precision back)"
            )
        if hasattr(module, "to_quantized"):
            found[path] = cast(Quantizable, module)
    if not found:
        raise UnsupportedModel(
            "the model has no module that mlx can quantize; stock `mlx_lm.convert` stores it as it is"
        )
    return found


def list_units(
    model: nn.Module,
    config: dict[str, Any],
    candidates: Sequence[Choice],
    *,
    unpackable: Collection[str] = (),
) -> tuple[Unit, ...]:
    """All units of a model with the choices their shapes and the family's own predicate allow.

    Modules that appear under several paths (shared weights) form one unit. mlx-lm fuses projections when
    it loads a checkpoint, so a fused projection is one module, hence one unit, here.

    Args:
        model: Module tree; weights may be lazy.
        config: Its config.json.
        candidates: Wanted choices; where a group does not divide a tensor's last axis, the next smaller
            group that does takes its place.
        unpackable: Paths that must be kept as they are (``check.unpackable_paths``).
    """
    modules = quantizable_modules(model)
    blocks = find_blocks(model)
    by_identity: dict[int, list[str]] = {}
    for path, module in modules.items():
        by_identity.setdefault(id(module), []).append(path)
    own_predicate = getattr(model, "quant_predicate", None)
    num_experts_used = experts_per_token(config)
    vocab = max((m.weight.shape[0] for m in modules.values() if isinstance(m, nn.Embedding)), default=0)
    units = []
    for paths in by_identity.values():
        path, module = paths[0], modules[paths[0]]
        block = blocks.index_of(path)
        kind = _kind(path, module, block, vocab)
        shape = tuple(int(n) for n in module.weight.shape)
        floor = KEEP if path in unpackable else _floor(path, module, kind, own_predicate)
        units.append(
            Unit(
                paths=tuple(paths),
                shape=shape,
                numel=module.weight.size * len(paths),
                kind=kind,
                block=block,
                module=blocks.role_of(path),
                active_share=_active_share(kind, shape, num_experts_used),
                floor=floor,
                choices=_allowed(shape[-1], candidates, floor),
            )
        )
    text = config.get("text_config") or {}
    return _mark_lookups(tuple(units), text.get("hidden_size", config.get("hidden_size")))


def total_numel(model: nn.Module) -> int:
    """Number of weights of the model, quantizable or not."""
    return sum(array.size for _, array in named_arrays(model.parameters()))


def fixed_bits(
    model: nn.Module, units: Iterable[Unit], float_bits: int, dtype_of: Callable[[str], mx.Dtype]
) -> int:
    """Stored bits of every parameter that is no unit's weight (norms, biases, state parameters).

    A unit that can only be kept counts with ``float_bits`` elsewhere; what its type takes beyond that (or
    less) is part of the sum.

    Args:
        model: Module tree.
        units: All its units.
        float_bits: Width in which :meth:`Choice.stored_bits` counts a kept weight.
        dtype_of: Type that an unquantized parameter will be written in, by name.
    """
    only_kept = {f"{path}.weight": unit.choices == (KEEP,) for unit in units for path in unit.paths}
    bits = 0
    for name, array in named_arrays(model.parameters()):
        written = dtype_of(name).size * 8
        if name not in only_kept:
            bits += array.size * written
        elif only_kept[name]:
            bits += array.size * (written - float_bits)
    return bits


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts block 2 before block 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def _kind(path: str, module: Quantizable, block: int | None, vocab: int) -> UnitKind:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, SwitchLinear):
        return "experts"
    if isinstance(module, MultiLinear):
        return "multilinear"
    if is_router(path):
        return "router"
    if block is None and vocab and module.weight.shape[0] == vocab:
        return "head"
    return "linear"


def _floor(
    path: str, module: Quantizable, kind: UnitKind, own_predicate: Callable[[str, Any], Any] | None
) -> Choice | None:
    """The least this unit may be stored as: the family's own rule, routers, selectors, state projections."""
    floor: Choice | None = None
    if kind == "router" or is_selector(path) or is_state_projection(path):
        floor = _EIGHT_BITS
    rule = own_predicate(path, module) if own_predicate is not None else True
    if not rule:
        return KEEP
    if isinstance(rule, dict):
        own = Choice(
            bits=rule["bits"], group_size=rule.get("group_size", 64), mode=rule.get("mode", "affine")
        )
        floor = max((own, floor), key=lambda c: c.bits) if floor else own
    if floor is not None and not floor.fits(module.weight.shape[-1]):
        group = next(
            (g for g in sorted(AFFINE_GROUPS, reverse=True) if module.weight.shape[-1] % g == 0), None
        )
        return Choice(bits=floor.bits, group_size=group) if group else KEEP
    return floor


def _allowed(last_dim: int, candidates: Sequence[Choice], floor: Choice | None) -> tuple[Choice, ...]:
    """Candidates that the shape takes, the floor among them, in ascending order of stored bits."""
    allowed = {floor} if floor is not None else set()
    for choice in candidates:
        fitting = choice
        if choice.mode == "affine" and not choice.fits(last_dim):
            groups = [g for g in AFFINE_GROUPS if g < choice.group_size and last_dim % g == 0]
            if not groups:
                continue
            fitting = Choice(bits=choice.bits, group_size=max(groups))
        if fitting.fits(last_dim) and (floor is None or fitting.bits >= floor.bits):
            allowed.add(fitting)
    return tuple(sorted(allowed or {KEEP}, key=lambda c: (c.bpw(), c)))


def _active_share(kind: UnitKind, shape: tuple[int, ...], num_experts_used: int | None) -> float:
    if kind == "experts" and num_experts_used:
        return min(1.0, num_experts_used / shape[0])
    return 1.0


def _mark_lookups(units: tuple[Unit, ...], width: int | None) -> tuple[Unit, ...]:
    """A table beside a head, or of another width than the model's, is read one row a token."""
    has_head = any(unit.kind == "head" for unit in units)
    return tuple(
        replace(unit, active_share=1.0 / unit.shape[0])
        if unit.kind == "embedding" and (has_head or width not in (None, unit.shape[-1]))
        else unit
        for unit in units
    )
