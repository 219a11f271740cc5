"""Find out before any long work whether a model runs, can be differentiated, and runs packed.

Everything here only builds graphs: no weight is read. Called by ``quant`` when a model is opened.
"""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.models.arrays import split_arrays
from mlx_optiq_ext.models.effects import Effects, replay
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import constant_indices, intercepted
from mlx_optiq_ext.models.walk import get_module, quantizable_modules

__all__ = ["require_runnable", "unpackable_paths"]

_NUM_TOKENS = 16
_FAILURES = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError)
_CRASHES = {"mlx_lm.models.phi3small": ("0.32.0", "0.32.1")}
"""Module of a family → the mlx-lm with which it writes outside of its logits, which can end the process
(``out[ids] = -inf`` indexes the rows with token ids), and the first one in which that is mended."""


def require_runnable(model: nn.Module, *, gradients: bool) -> None:
    """Refuse a model whose forward pass, or its gradient, cannot even be set up here.

    Args:
        model: Weights may be lazy.
        gradients: Whether it must be differentiable.
    Raises:
        UnsupportedModel: Says what failed and what would work.
    """
    name = type(model).__module__
    crashes_with, mended_in = _CRASHES.get(name, ("", ""))
    if crashes_with and version("mlx-lm") == crashes_with:
        raise UnsupportedModel(
            f"{name} of mlx-lm {crashes_with} writes outside of its arrays and can end the process; "
            f"pip install 'mlx-lm>={mended_in},<0.33'"
        )
    blocks = find_blocks(model)
    calls = 0

    def shifted(delta: mx.array | None) -> mx.array:
        def answer(_: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal calls
            calls += 1
            if delta is None:
                return original(*args, **kwargs)
            leaves, rebuild = split_arrays((args, kwargs))
            floats = [mx.issubdtype(leaf.dtype, mx.floating) for leaf in leaves]
            moved = rebuild(
                [x + delta.astype(x.dtype) if f else x for x, f in zip(leaves, floats, strict=True)]
            )
            effects = Effects(moved)
            made, rebuild_outcome = effects.after(original(*moved[0], **moved[1]))
            return replay((args, kwargs), rebuild_outcome(made))

        with intercepted(blocks.modules, answer):
            output = model(mx.zeros((1, _NUM_TOKENS), dtype=mx.int32))
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        return mx.sum(logits)

    try:
        shifted(None)
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{name} does not run on this machine ({error}); measure it where `mlx_lm.generate` runs it, "
            "or use --method static"
        ) from error
    if not calls:
        raise UnsupportedModel(
            f"{name} reaches into its blocks in place of calling them, so it cannot be measured block by "
            "block; use --method static"
        )
    if not gradients:
        return
    try:
        with constant_indices():
            mx.grad(shifted)(mx.zeros((1,)))
    except _FAILURES as error:
        raise UnsupportedModel(
            f"{name} cannot be differentiated ({error}); use --method kl, which only runs it forward, "
            "or --method static"
        ) from error


def unpackable_paths(model: nn.Module) -> set[str]:
    """Modules that could be packed by their shape, but that do not run packed.

    A tied head written as ``h @ embed.weight.T`` cannot use a packed table, and a family's own linear may
    not know the modes that mlx-lm packs with. Found by setting up the forward pass with everything packed;
    where the model does not run at all, nothing is found.
    """
    paths = [path for path, module in quantizable_modules(model).items() if module.weight.shape[-1] % 32 == 0]
    if not _runs(model, ()) or _runs(model, paths):
        return set()
    return {path for path in paths if not _runs(model, (path,))}


def _runs(model: nn.Module, packed: Iterable[str]) -> bool:
    """Whether the forward pass can be set up with some modules packed; the model is left as it was."""
    originals = {path: get_module(model, path) for path in packed}
    try:
        model.update_modules(
            tree_unflatten(
                [
                    (path, module.to_quantized(group_size=32, bits=8, mode="affine"))
                    for path, module in originals.items()
                ]
            )
        )
        model(mx.zeros((1, _NUM_TOKENS), dtype=mx.int32))
    except _FAILURES:
        return False
    finally:
        model.update_modules(tree_unflatten(list(originals.items())))
    return True
