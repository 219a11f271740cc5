"""The seam of ``mlx_lm.models.base``: attention over keys and values that are stored apart.

mlx-lm's models call one function with whatever their cache returned. Ours looks whether that is one of our
stored tensors and hands everything else on, untouched. Stays light: imported whenever mlx-lm's models are.
"""

import functools
from types import ModuleType
from typing import Any

from mlx_optiq_ext.patches.bindings import replace
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable

__all__ = ["PATCH"]

_NAME = "scaled_dot_product_attention"
_MARK = "_mlx_optiq_ext"
_PARAMETERS = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")


def _apply(module: ModuleType) -> Undo:
    original = require_callable(module, _NAME, _PARAMETERS)
    return replace(module, {_NAME: _wrap(original)})


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, _NAME, None), _MARK)


def _probe(module: ModuleType) -> str:
    """Attend over one stored token; lazy."""
    import mlx.core as mx  # deferred: only the doctor asks

    from mlx_optiq_ext.kv.codec import Codec
    from mlx_optiq_ext.kv.stored import Stored
    from mlx_optiq_ext.types.quant import Choice

    codec = Codec(Choice(bits=8, group_size=32), 32, rotate=True)
    ones = mx.ones((1, 1, 1, 32))
    stored = Stored(codec, codec.pack(codec.transform(ones)), ones.dtype)
    try:
        out = module.scaled_dot_product_attention(ones, stored, stored, cache=None, scale=1.0, mask=None)
    except Exception as error:  # noqa: BLE001  whatever stock code raises on what it does not know
        return f"stored keys are not understood: {error}"
    if out.shape != ones.shape or not mx.allclose(out, ones, atol=1e-2).item():
        return "attention over one stored value does not return it"
    return ""


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def scaled_dot_product_attention(queries: Any, keys: Any, *rest: Any, **named: Any) -> Any:
        if not hasattr(keys, "is_optiq_stored"):
            return original(queries, keys, *rest, **named)
        from mlx_optiq_ext.kv.attention import attend  # loaded already: it made the keys

        given = dict(zip(_PARAMETERS[2:], rest, strict=False)) | named
        values, scale = given["values"], given["scale"]
        return attend(queries, keys, values, scale, given.get("mask"), given.get("sinks"))

    setattr(scaled_dot_product_attention, _MARK, PATCH.name)
    return scaled_dot_product_attention


PATCH = Patch(
    name="attention",
    target="mlx_lm.models.base",
    minimum=(0, 32),
    below=(0, 33),
    why="KV caches with different precision for keys and values, rotated, in every model.",
    apply=_apply,
    is_applied=_is_applied,
    probe=_probe,
)
