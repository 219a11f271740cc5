"""Codes, scales and biases in MLX's own layout, and back to numbers.

Knows the bit layout and nothing about how codes are chosen (``fit``, ``gptq``). Used by ``correct``.
"""

from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from mlx_optiq_ext.errors import ModelError, UsageError
from mlx_optiq_ext.types.quant import Choice

__all__ = ["Packed", "join_codes", "pack_plain", "require_finite", "unpack"]

_CODES_PER_RUN = 32


class Packed(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor as MLX stores it: what ``mx.quantize`` returns and ``mx.quantized_matmul`` takes."""

    weight: mx.array
    """uint32 words of packed codes, shape (O, I·bits/32) or (E, O, I·bits/32)."""
    scales: mx.array
    """(O, I/group_size): the float dtype for affine, uint8 for the float modes."""
    biases: mx.array | None = None
    """Like ``scales`` for affine; None for the float modes."""


def pack_plain(weight: mx.array, choice: Choice, *, float_dtype: mx.Dtype) -> Packed:
    """Quantize as the stock conversion does: cast to ``float_dtype``, then ``mx.quantize``.

    Args:
        weight: (O, I) or (E, O, I), any float dtype.
        choice: Any choice but keep.
        float_dtype: Type of the checkpoint's unquantized numbers, hence of scales and biases.
    Returns:
        Lazy arrays, bit-identical to stock.
    Raises:
        UsageError: ``choice`` is keep or does not divide the last axis.
    """
    require_fit(weight, choice)
    cast = weight.astype(float_dtype)
    parts = mx.quantize(cast, group_size=choice.group_size, bits=choice.bits, mode=choice.mode)
    return Packed(weight=parts[0], scales=parts[1], biases=parts[2] if len(parts) == 3 else None)


def unpack(packed: Packed, choice: Choice) -> mx.array:
    """The numbers that a packed tensor stands for, in float32; lazy.

    For affine this is code · scale + bias evaluated in float32, which is what the matrix kernels
    accumulate. ``mx.dequantize`` at half precision would round every weight once more, so scales and biases
    are widened first; all errors in this package are taken against these numbers.
    """
    scales, biases = packed.scales, packed.biases
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        packed.weight,
        scales,
        biases,
        group_size=choice.group_size,
        bits=choice.bits,
        mode=choice.mode,
        dtype=mx.float32,
    )


def join_codes(codes: Any, bits: int) -> mx.array:
    """Pack codes of ``bits`` bits into uint32 words, first code in the lowest bits.

    Widths that do not divide 32 run on across words: 32 codes always fill ``bits`` words.

    Args:
        codes: Integers below 2**bits, shape (..., I) with I a multiple of 32; NumPy or MLX.
        bits: Width of a code.
    Returns:
        (..., I·bits/32) uint32; evaluated for NumPy input, lazy for MLX input.
    Source: MLX, Python reference of ``quantize`` ("packed from the lower to upper bits").
    """
    xp: Any = mx if isinstance(codes, mx.array) else np
    runs = codes.reshape(*codes.shape[:-1], -1, _CODES_PER_RUN).astype(xp.uint32)
    words: list[Any] = [None] * bits
    for position in range(_CODES_PER_RUN):
        word, shift = divmod(position * bits, 32)
        column = runs[..., position]
        low = column << xp.array(shift, dtype=xp.uint32)
        words[word] = low if words[word] is None else words[word] | low
        if shift + bits > 32:
            words[word + 1] = column >> xp.array(32 - shift, dtype=xp.uint32)
    joined = xp.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)
    return joined if isinstance(joined, mx.array) else mx.array(joined)


def require_fit(weight: mx.array, choice: Choice) -> None:
    """Raise UsageError unless ``weight`` can be stored as ``choice``."""
    if choice.mode == "keep":
        raise UsageError("choice keep stores nothing packed; copy the tensor as it is")
    if weight.ndim not in (2, 3) or not choice.fits(weight.shape[-1]):
        raise UsageError(
            f"a tensor of shape {tuple(weight.shape)} cannot be stored as {choice.label}: it needs 2 or 3 "
            f"axes and a last axis that is a multiple of {choice.group_size}"
        )


def require_finite(weight: mx.array, what: str = "weight") -> None:
    """Raise ModelError where a tensor holds NaN or infinity; evaluates."""
    bad = mx.sum(mx.logical_not(mx.isfinite(weight))).item()
    if bad:
        raise ModelError(
            f"{what} of shape {tuple(weight.shape)} holds {bad} non-finite values (NaN or infinity); "
            "the checkpoint is damaged or was saved in a type too narrow for it"
        )
