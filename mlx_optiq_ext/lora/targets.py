"""Which modules of a model an adapter can change.

Knows module kinds and the places in a block where they stand, not ranks. Called by ``ranks`` and by the
extension of ``mlx_lm.lora``.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_optiq_ext.errors import AdapterError, UsageError
from mlx_optiq_ext.models.families import Blocks, find_blocks, is_router, is_selector
from mlx_optiq_ext.types.adapter import ADAPTER_GROUPS, AdapterOptions, LoraTarget, TargetGroup, TargetKind
from mlx_optiq_ext.types.quant import Choice

__all__ = ["choice_of", "list_targets", "select_targets", "target_kind"]

_ATTENTION = ("attn", "attention", "mixer", "ssm", "mamba", "conv", "recurrent", "temporal")
_KINDS: Mapping[TargetKind, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, nn.QuantizedLinear),
    "experts": (SwitchLinear, QuantizedSwitchLinear),
    "embedding": (nn.Embedding, nn.QuantizedEmbedding),
}


def select_targets(model: nn.Module, options: AdapterOptions) -> tuple[LoraTarget, ...]:
    """The targets that the options name, in the order of the blocks.

    Raises:
        UsageError: An unknown group, a pattern that matches nothing, or nothing is left.
        AdapterError: As :func:`list_targets`.
    """
    groups = _groups(options.targets)
    found = [target for target in list_targets(model) if target.group in groups]
    blocks = [target.block for target in found if target.block is not None]
    if options.num_blocks is not None and blocks:
        first = max(blocks) + 1 - options.num_blocks
        found = [target for target in found if target.block is None or target.block >= first]
    for pattern in options.adapt:
        if not any(_matches(target.path, pattern) for target in found):
            raise UsageError(
                f"--adapt {pattern!r} matches none of {len(found)} modules, such as "
                f"{found[0].path if found else 'none'}; * stands for anything"
            )
    if options.adapt:
        found = [t for t in found if any(_matches(t.path, pattern) for pattern in options.adapt)]
    if not found:
        raise UsageError(f"--targets {options.targets} names no module of this model; use {_named(model)}")
    return tuple(found)


def list_targets(model: nn.Module) -> tuple[LoraTarget, ...]:
    """Every module that mlx-lm has an adapter for.

    Raises:
        AdapterError: The model carries adapters already.
    """
    blocks = find_blocks(model)
    found: list[LoraTarget] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if "lora_a" in module:
            raise AdapterError(f"{path} has an adapter already; load the base model without one")
        kind = target_kind(module)
        if kind is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(_target(path, module, kind, blocks))
    return tuple(sorted(found, key=lambda t: (-1 if t.block is None else t.block, t.path)))


def target_kind(module: nn.Module) -> TargetKind | None:
    """Kind of a module that can be adapted, None of all others."""
    return next((kind for kind, classes in _KINDS.items() if isinstance(module, classes)), None)


def choice_of(module: Any) -> Choice | None:
    """How a module stores its weight; None where it is not quantized."""
    if "scales" not in module:
        return None
    return Choice(bits=module.bits, group_size=module.group_size, mode=module.mode)


def _target(path: str, module: Any, kind: TargetKind, blocks: Blocks) -> LoraTarget:
    shape = tuple(int(n) for n in module.weight.shape)
    choice = choice_of(module)
    width = shape[-1] * 32 // choice.bits if choice is not None else shape[-1]
    rows = shape[-2]
    block = blocks.index_of(path)
    return LoraTarget(
        path=path,
        kind=kind,
        group=_group(path, kind, block, blocks.role_of(path)),
        inputs=rows if kind == "embedding" else width,
        outputs=width if kind == "embedding" else rows,
        experts=shape[0] if kind == "experts" else 1,
        block=block,
        choice=choice,
    )


def _group(path: str, kind: TargetKind, block: int | None, role: str) -> TargetGroup:
    if kind == "embedding" or block is None:
        return "embeddings"
    if kind == "experts":
        return "experts"
    if is_router(path) or is_selector(path):
        return "router"
    return "attention" if any(word in role for word in _ATTENTION) else "mlp"


def _groups(text: str) -> Sequence[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in ADAPTER_GROUPS]
    if unknown or not words:
        raise UsageError(
            f"--targets {text!r}: {unknown[0] if unknown else 'nothing'} is no group; use some of "
            f"{', '.join(ADAPTER_GROUPS)}, and --adapt PATTERN for single paths"
        )
    return words


def _matches(path: str, pattern: str) -> bool:
    """Whole path, or its last parts: ``q_proj`` and ``*.3.mlp.*`` both do."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _named(model: nn.Module) -> str:
    found = {target.group for target in list_targets(model)}
    return ", ".join(group for group in ADAPTER_GROUPS if group in found) or "another model"
