"""Add an adapter into the weights of its base, stored as the base stores them or unquantized.

Knows modules and arrays, not folders. Called by ``optiq lora fuse`` through ``fuse_folder``.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.targets import choice_of, target_kind
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.correct import pack
from mlx_optiq_ext.quant.pack import Packed, unpack

__all__ = ["Store", "fuse_modules", "fused_weight"]

Store = Literal["same", "dense"]


def fuse_modules(
    model: nn.Module,
    adapter: Adapter,
    *,
    store: Store = "same",
    importance: Mapping[str, mx.array] | None = None,
    float_dtype: mx.Dtype = mx.float32,
) -> dict[str, nn.Module]:
    """The modules that take the place of the adapted ones; the model is not changed.

    Args:
        model: The base, without adapter layers.
        adapter: With the model's own paths (``files.locate_factors``).
        store: same: every module with its own bits, group and mode; dense: unquantized.
        importance: Second moments of the inputs by path: rounding is fitted to them; plain without.
        float_dtype: Type of dense weights; of unquantized modules it is their own.
    Returns:
        By path; evaluated.
    """
    fused: dict[str, nn.Module] = {}
    for path, factors in adapter.factors.items():
        module: Any = get_module(model, path)
        choice = choice_of(module)
        weight = fused_weight(module, factors, adapter.config.scale_of(path))
        if choice is None:
            fused[path] = _with(module, weight=weight.astype(module.weight.dtype))
        elif store == "dense":
            fused[path] = _dense(module, weight.astype(float_dtype))
        else:
            stored_dtype = module.scales.dtype if choice.mode == "affine" else float_dtype
            own = (importance or {}).get(path)
            level: Literal["none", "fast"] = "none" if own is None else "fast"
            packed = pack(weight, choice, level=level, float_dtype=stored_dtype, importance=own)
            fused[path] = _with(module, weight=packed.weight, scales=packed.scales, biases=packed.biases)
        mx.eval(fused[path].parameters())
    return fused


def fused_weight(module: Any, factors: Factors, scale: float) -> mx.array:
    """W + scale · (A·B)ᵀ in float32; of an embedding W + scale · A·B. Lazy."""
    choice = choice_of(module)
    weight: mx.array = module.weight
    if choice is not None:
        weight = unpack(Packed(weight=weight, scales=module.scales, biases=module.get("biases")), choice)
    delta = factors.a.astype(mx.float32) @ factors.b.astype(mx.float32)
    if target_kind(module) != "embedding":
        delta = delta.swapaxes(-1, -2)
    return weight.astype(mx.float32) + scale * delta


def _with(module: Any, **arrays: mx.array | None) -> nn.Module:
    """A module like this one with other arrays."""
    other: nn.Module = copy(module)
    for name, array in arrays.items():
        setattr(other, name, array)
    return other


def _dense(module: Any, weight: mx.array) -> nn.Module:
    """The unquantized kind of a quantized module."""
    kind = target_kind(module)
    dense: Any
    if kind == "embedding":
        dense = nn.Embedding(1, 1)
    elif kind == "experts":
        dense = SwitchLinear(1, 1, 1, bias=False)
    else:
        dense = nn.Linear(1, 1, bias=False)
    dense.weight = weight
    if "bias" in module:
        dense.bias = module.bias
    return dense  # type: ignore[no-any-return]
