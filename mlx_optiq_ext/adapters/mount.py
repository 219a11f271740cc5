"""Mount adapters on a model and take them off, while rows run.

Knows modules and slots, not names or requests. Called by ``engine`` on the owner thread, between steps.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_optiq_ext.adapters.layers import (
    RoutedEmbedding,
    RoutedLayer,
    RoutedLinear,
    RoutedSwitchLinear,
    noting_experts,
)
from mlx_optiq_ext.adapters.rows import BASE
from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.lora.factors import Factors
from mlx_optiq_ext.lora.targets import target_kind
from mlx_optiq_ext.types.adapter import TargetKind

__all__ = ["AdapterMount"]


class AdapterMount:
    """The adapters of one model.

    Args:
        model: As mlx-lm loads it; its layers are wrapped where an adapter needs it, and unwrapped again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        """The model's own, whatever is mounted."""
        self._routed: dict[str, RoutedLayer] = {}
        self._used: dict[int, int] = {}
        """Slot → bytes."""

    def mount(self, residuals: Mapping[str, Factors]) -> int:
        """Give an adapter a slot.

        Args:
            residuals: By path of the layer, their scale in ``b``, in the type that the model computes in.
        Raises:
            AdapterError: A path is no layer of this model, a shape does not fit, or a number is not finite;
                nothing is mounted then.
        """
        for path, residual in residuals.items():
            _check(path, self._modules.get(path), residual)
        slot = next(k for k in range(BASE + 1, len(self._used) + BASE + 2) if k not in self._used)
        for path, residual in residuals.items():
            self._route(path).put(slot, residual)
        self._used[slot] = sum(each.nbytes for residual in residuals.values() for each in residual)
        return slot

    def unmount(self, slot: int) -> None:
        """Empty a slot; layers without any get their own class back."""
        for path, routed in list(self._routed.items()):
            if not routed.take(slot):
                self._set(path, routed.base)
                del self._routed[path]
        del self._used[slot]
        mx.clear_cache()

    @property
    def nbytes(self) -> int:
        """Bytes of all mounted adapters."""
        return sum(self._used.values())

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Path and layer of the model without adapters, as ``Module.named_modules`` lists them."""
        return list(self._modules.items())

    def _route(self, path: str) -> RoutedLayer:
        known = self._routed.get(path)
        if known is None:
            known = _ROUTED[target_kind(self._modules[path])](self._modules[path])
            if isinstance(known, RoutedSwitchLinear):
                noting_experts(self._modules[path.rpartition(".")[0]])
            self._set(path, known)
            self._routed[path] = known
        return known

    def _set(self, path: str, module: Any) -> None:
        self._model.update_modules(tree_unflatten([(path, module)]))


_ROUTED: dict[TargetKind | None, type[RoutedLayer]] = {
    "experts": RoutedSwitchLinear,
    "embedding": RoutedEmbedding,
    "linear": RoutedLinear,
}


def _check(path: str, module: nn.Module | None, residual: Factors) -> None:
    if module is None or target_kind(module) is None:
        raise AdapterError(f"the adapter has weights for {path}, which is no layer of this model")
    wanted = _shape(module)
    found = (*residual.a.shape[:-1], residual.b.shape[-1])
    if wanted != found or residual.a.shape[-1] != residual.b.shape[-2]:
        raise AdapterError(
            f"{path} has shape {wanted} (experts, inputs, outputs), the adapter {found}: it was made for "
            "another model"
        )
    if not residual.is_finite():
        raise AdapterError(f"the adapter's weights for {path} are not finite; train it again")


def _shape(module: Any) -> tuple[int, ...]:
    """(E,) I, O of a layer; V, D of an embedding."""
    shape = tuple(int(size) for size in module.weight.shape)
    width = shape[-1] * 32 // module.bits if hasattr(module, "bits") else shape[-1]
    if hasattr(module, "as_linear"):
        return (shape[0], width)
    return (*shape[:-2], width, shape[-2])
