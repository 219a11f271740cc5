"""Bring a checkpoint into a form whose logits, and gradients, are exact.

On the CPU half-precision kernels add more error than a good quantization does, so everything runs in float32
there, with packed weights unpacked where memory allows. On a GPU models run as they are stored. Called by
what scores and by what trains.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_optiq_ext.errors import ResourceError
from mlx_optiq_ext.models.load import cast_floats
from mlx_optiq_ext.quant.pack import Packed, unpack
from mlx_optiq_ext.types.quant import Choice

__all__ = ["make_exact", "parameter_nbytes", "run_exactly", "unpack_weights"]

_DENSE_SHARE = 0.4
_RESIDENT_SHARE = 0.9


def make_exact(
    model: nn.Module, what: str, *, remedy: str = "score it on a larger machine, or convert with --no-score"
) -> nn.Module:
    """Evaluate the model's weights in the form it will run in; changes and returns the model.

    Args:
        model: Weights may be lazy.
        what: Name for messages.
        remedy: What to do where it does not fit.
    Raises:
        ResourceError: The weights do not fit into memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if on_cpu:
        cast_floats(model, mx.float32)
        if 4 * _dense_numel(model) <= _DENSE_SHARE * memory:
            unpack_weights(model)
    needed = parameter_nbytes(model)
    if needed > _RESIDENT_SHARE * memory:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, this machine has {memory / 1e9:.1f} GB; {remedy}"
        )
    mx.eval(model.parameters())
    model.eval()
    return model


@contextmanager
def run_exactly(model: nn.Module, what: str, *, remedy: str) -> Iterator[None]:
    """Let a model run as :func:`make_exact` says for a while; its packed modules then come back.

    Raises:
        ResourceError: The weights do not fit into memory.
    """
    packed = [(path, module) for path, module in model.named_modules() if "scales" in module]
    make_exact(model, what, remedy=remedy)
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(packed))


def unpack_weights(model: nn.Module) -> None:
    """Replace packed modules by dense float32 ones, one at a time; evaluates.

    Modules of unknown kinds stay packed: their float32 kernels are exact too, only slower.
    """
    for path, module in list(model.named_modules()):
        if "scales" not in module or "global_scale" in module:
            continue
        dense = _dense_like(module)
        if dense is None:
            continue
        choice = Choice(
            bits=module.bits, group_size=module.group_size, mode=getattr(module, "mode", "affine")
        )
        packed = Packed(weight=module["weight"], scales=module["scales"], biases=module.get("biases"))
        dense["weight"] = unpack(packed, choice)
        if "bias" in module:
            dense["bias"] = module["bias"].astype(mx.float32)
        mx.eval(dense.parameters())
        model.update_modules(tree_unflatten([(path, dense)]))


def parameter_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are; evaluates nothing."""
    leaves: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in leaves)


def _dense_like(module: nn.Module) -> nn.Module | None:
    """A dense module of the same kind; its random weights are lazy and never made."""
    has_bias = "bias" in module
    if isinstance(module, nn.QuantizedLinear):
        return nn.Linear(1, 1, bias=has_bias)
    if isinstance(module, nn.QuantizedEmbedding):
        return nn.Embedding(1, 1)
    if isinstance(module, QuantizedSwitchLinear):
        return SwitchLinear(1, 1, 1, bias=has_bias)  # type: ignore[no-any-return]
    if isinstance(module, QuantizedMultiLinear):
        return MultiLinear(1, 1, 1)  # type: ignore[no-any-return]
    return None


def _dense_numel(model: nn.Module) -> int:
    """Weights of the model before packing."""
    total = 0
    for _, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        for name, array in own.items():
            if "scales" in own and name == "weight":
                total += array.size * 32 // module.bits
            elif "scales" not in own or name not in {"scales", "biases"}:
                total += array.size
    return total
