"""Put mlx-lm's own adapter layers onto a model, each with its rank.

mlx-lm's ``LoRALinear``, ``LoRASwitchLinear`` and ``LoRAEmbedding`` are right for every bit width and mode;
its ``DoRALinear`` is not (its input width is wrong at 3, 5 and 6 bits) and is never used. Knows modules, not
files. Called by ``train``, ``files`` and the extension of ``mlx_lm.lora``.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.lora.factors import Factors
from mlx_optiq_ext.lora.targets import target_kind
from mlx_optiq_ext.types.adapter import RankMap, TargetKind

__all__ = [
    "DORA_REFUSAL",
    "adapt_modules",
    "adapted_modules",
    "apply_lora",
    "get_factors",
    "remove_lora",
    "set_factors",
]

DORA_REFUSAL = (
    "DoRA is not supported on quantized weights: it rescales every row of the base's weight, and mlx-lm's "
    "layer computes a wrong width at 3, 5 and 6 bits and has no quantized embedding; use LoRA"
)
_LAYERS: Mapping[TargetKind, Any] = {
    "linear": LoRALinear,
    "experts": LoRASwitchLinear,
    "embedding": LoRAEmbedding,
}


def apply_lora(
    model: nn.Module, ranks: RankMap, *, scale: float, dropout: float = 0.0, seed: int = 0
) -> dict[str, nn.Module]:
    """Freeze a model and give every target its adapter, which starts as nothing: B is zero.

    Args:
        model: The base, quantized or not; changed in place.
        ranks: Rank per path.
        scale: Factor on B·A·x.
        dropout: Of the adapters' inputs, while training.
        seed: Decides A; the same for a path whatever else is adapted.
    Returns:
        The adapter layers by path; only their factors are trainable, float32.
    Raises:
        AdapterError: A path is no module of the model that can be adapted.
    """
    model.freeze()
    wanted = {path: rank for path, rank in ranks.ranks.items() if rank}
    layers = adapt_modules(model, wanted, scale=scale, dropout=dropout)
    for path, layer in layers.items():
        bound = 1 / math.sqrt(_fan_in(layer))
        key = mx.random.key(zlib.crc32(f"{seed} {path}".encode()))
        layer.lora_a = mx.random.uniform(-bound, bound, layer.lora_a.shape, key=key)
    mx.eval([layer.lora_a for layer in layers.values()])
    return layers


def adapt_modules(
    model: nn.Module, ranks: Mapping[str, int], *, scale: float, dropout: float = 0.0
) -> dict[str, Any]:
    """Wrap modules in adapter layers with mlx-lm's own start; lazy, nothing is frozen.

    Raises:
        AdapterError: A path is no module that can be adapted.
    """
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    for path, rank in ranks.items():
        kind = target_kind(modules[path]) if path in modules else None
        if kind is None:
            raise AdapterError(
                f"{path} is no linear, expert or embedding layer of this model; it was made for another"
            )
        layers[path] = _LAYERS[kind].from_base(modules[path], r=rank, scale=scale, dropout=dropout)
    model.update_modules(tree_unflatten(list(layers.items())))
    return layers


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Every adapter layer of a model by path.

    Raises:
        AdapterError: One of them is a DoRA layer.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if "lora_a" not in module:
            continue
        if "m" in module:
            raise AdapterError(f"{path}: {DORA_REFUSAL}")
        found[path] = module
    return dict(sorted(found.items()))


def remove_lora(model: nn.Module) -> None:
    """Give a model its own modules back."""
    layers = adapted_modules(model)
    model.update_modules(tree_unflatten([(path, base_of(layer)) for path, layer in layers.items()]))


def base_of(layer: Any) -> Any:
    """The module that an adapter layer wraps."""
    return layer.embedding if isinstance(layer, LoRAEmbedding) else layer.linear


def get_factors(layer: Any) -> Factors:
    """The factors of an adapter layer, without its scale; lazy."""
    if isinstance(layer, LoRASwitchLinear):
        return Factors(layer.lora_a.swapaxes(-1, -2), layer.lora_b.swapaxes(-1, -2))
    return Factors(layer.lora_a, layer.lora_b)


def set_factors(layer: Any, factors: Factors) -> None:
    """Give an adapter layer its factors; their rank may be another one.

    Raises:
        AdapterError: They belong to a layer of another shape.
    """
    present = get_factors(layer)
    if (*present.a.shape[:-1], present.b.shape[-1]) != (*factors.a.shape[:-1], factors.b.shape[-1]):
        raise AdapterError(
            f"the adapter's factors {factors.a.shape} and {factors.b.shape} do not fit a layer that takes "
            f"{present.a.shape[:-1]} and gives {present.b.shape[-1]}; it was made for another model"
        )
    swap = isinstance(layer, LoRASwitchLinear)
    layer.lora_a = factors.a.swapaxes(-1, -2) if swap else factors.a
    layer.lora_b = factors.b.swapaxes(-1, -2) if swap else factors.b


def _fan_in(layer: Any) -> int:
    return int(get_factors(layer).a.shape[-2])
