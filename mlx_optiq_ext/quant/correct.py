"""Better rounding, stored as ordinary MLX tensors: none (plain), fast (weighted fit), full (GPTQ with it).

The one door: measurement and writer call :func:`pack` with a level, so that the errors that are measured are
those of the weights that are written. Knows nothing of models or files.
"""

from typing import Literal

import mlx.core as mx

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.quant.fast import pack_fast
from mlx_optiq_ext.quant.full import pack_full
from mlx_optiq_ext.quant.pack import Packed, pack_plain, unpack
from mlx_optiq_ext.types.quant import Choice

__all__ = [
    "Level",
    "Packed",
    "gram_error",
    "pack",
    "pack_fast",
    "pack_full",
    "pack_plain",
    "unpack",
]

Level = Literal["none", "fast", "full"]


def pack(
    weight: mx.array,
    choice: Choice,
    *,
    level: Level,
    float_dtype: mx.Dtype,
    importance: mx.array | None = None,
    gram: mx.array | None = None,
) -> Packed:
    """Quantize one tensor at a correction level.

    Args:
        weight: (O, I) or (E, O, I).
        choice: How to store it; any but keep.
        level: none = :func:`pack_plain`, fast = :func:`pack_fast`, full = :func:`pack_full`.
        float_dtype: Stored type of affine scales and biases.
        importance: E[x_j²] of the inputs, (I,) or (E, I); fast needs it or the Gram, whose diagonal it is.
        gram: E[x xᵀ] of the inputs, (I, I) or (E, I, I); full needs it.
    Raises:
        UsageError: A statistic that the level needs is missing.
    """
    if level == "none":
        return pack_plain(weight, choice, float_dtype=float_dtype)
    if level == "full":
        if gram is None:
            raise UsageError("correction 'full' needs the Gram of the inputs; measure it or use 'fast'")
        return pack_full(weight, choice, gram, float_dtype=float_dtype)
    if importance is None and gram is not None:
        importance = mx.diagonal(gram, axis1=-2, axis2=-1)
    if importance is None:
        raise UsageError("correction 'fast' needs the inputs' second moments; measure them or use 'none'")
    return pack_fast(weight, choice, importance, float_dtype=float_dtype)


def gram_error(weight: mx.array, packed: Packed, choice: Choice, gram: mx.array) -> mx.array:
    """Tr(E G Eᵀ) with E = ŵ − w, float32 scalar, lazy: what :func:`pack_full` minimises."""
    error = unpack(packed, choice) - weight.astype(mx.float32)
    return (error * (error @ gram.astype(mx.float32))).sum()
