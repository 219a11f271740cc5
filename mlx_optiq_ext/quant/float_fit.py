"""Scales of the float modes (mxfp4, nvfp4, mxfp8) that minimise the importance-weighted rounding error.

Works on float32 arrays of NumPy or MLX alike (``xp`` is the module). Knows nothing of tensors or files.
Called by ``fast``.
"""

from typing import Any

import msgspec

from mlx_optiq_ext.quant.fit import Array
from mlx_optiq_ext.types.quant import Mode

__all__ = ["FloatGroups", "decode_float_codes", "decode_float_scales", "fit_float_groups"]

_SCALE_STEPS = {"mxfp4": (-1, 1), "mxfp8": (-1, 1), "nvfp4": (-5, -4, -3, -2, -1, 1, 2, 3, 4)}
_LARGEST_SCALE = {"mxfp4": 254, "mxfp8": 254, "nvfp4": 126}
_LARGEST = {"mxfp4": 6.0, "nvfp4": 6.0, "mxfp8": 448.0}
_LOWEST_NORMAL = 2.0**-6


class FloatGroups(msgspec.Struct, frozen=True, kw_only=True):
    """Rounded groups of a float mode."""

    codes: Array
    """(R, G, group_size) integers as float32: the bit patterns of e2m1 or e4m3."""
    scale: Array
    """(R, G) integers as float32: the bit patterns of e8m0 or, for nvfp4, e4m3."""


def fit_float_groups(weight: Array, importance: Array, start: Array, mode: Mode, xp: Any) -> FloatGroups:
    """Try the scales next to ``start`` and keep, per group, the one with the least weighted error.

    Args:
        weight: (R, G, group_size) float32.
        importance: a_j > 0, broadcastable to ``weight``.
        start: (R, G) scale bytes of ``mx.quantize``, as float32; kept where nothing beats them.
        mode: mxfp4, nvfp4 or mxfp8.
        xp: ``numpy`` or ``mlx.core``, whichever made the arrays.
    """
    best, best_error = start, _weighted_square(weight, importance, start, mode, xp)
    for step in _SCALE_STEPS[mode]:
        scale = xp.clip(start + step, 1, _LARGEST_SCALE[mode])
        error = _weighted_square(weight, importance, scale, mode, xp)
        better = error < best_error
        best, best_error = xp.where(better, scale, best), xp.where(better, error, best_error)
    return FloatGroups(codes=_encode(_rounded(weight, best, mode, xp), mode, xp), scale=best)


def decode_float_scales(scale: Array, mode: Mode, xp: Any) -> Array:
    """What scale bytes stand for, float32.

    Source: OCP Microscaling Formats 1.0 (e8m0: 2**(byte − 127)); OCP FP8 (e4m3).
    """
    if mode == "nvfp4":
        return decode_float_codes(scale, "mxfp8", xp)
    return 2.0 ** (scale - 127.0)


def decode_float_codes(codes: Array, mode: Mode, xp: Any) -> Array:
    """What codes stand for before scaling, float32: e4m3 for mxfp8, else e2m1."""
    mantissa_bits, bias = (3, 7) if mode == "mxfp8" else (1, 1)
    sign_bit = 128 if mode == "mxfp8" else 8
    negative = codes >= sign_bit
    magnitude = xp.where(negative, codes - sign_bit, codes)
    steps = 1 << mantissa_bits
    exponent = xp.floor(magnitude / steps)
    fraction = magnitude / steps - exponent
    normal = (1.0 + fraction) * 2.0 ** (exponent - bias)
    value = xp.where(exponent > 0, normal, fraction * 2.0 ** (1 - bias))
    return xp.where(negative, -value, value)


def _rounded(weight: Array, scale: Array, mode: Mode, xp: Any) -> Array:
    """Weights in units of the scale, rounded to the nearest number of the code's format."""
    factor = decode_float_scales(scale, mode, xp)
    position = weight * xp.where(factor > 0, 1.0 / xp.where(factor > 0, factor, 1.0), 0.0)[..., None]
    position = xp.clip(position, -_LARGEST[mode], _LARGEST[mode])
    step = _spacing(xp.abs(position), mode, xp)
    return xp.round(position / step) * step


def _spacing(magnitude: Array, mode: Mode, xp: Any) -> Array:
    """Distance between neighbouring numbers of the code's format around ``magnitude``."""
    if mode == "mxfp8":
        return 2.0 ** (xp.floor(xp.log2(xp.maximum(magnitude, _LOWEST_NORMAL))) - 3.0)
    return xp.where(magnitude < 2, 0.5, xp.where(magnitude < 4, 1.0, 2.0)).astype(xp.float32)


def _weighted_square(weight: Array, importance: Array, scale: Array, mode: Mode, xp: Any) -> Array:
    factor = decode_float_scales(scale, mode, xp)[..., None]
    error = _rounded(weight, scale, mode, xp) * factor - weight
    return (importance * error * error).sum(-1)


def _encode(value: Array, mode: Mode, xp: Any) -> Array:
    """Bit patterns of numbers that the code's format holds exactly."""
    magnitude = xp.abs(value)
    if mode == "mxfp8":
        exponent = xp.floor(xp.log2(xp.maximum(magnitude, _LOWEST_NORMAL)))
        normal = (exponent + 6.0) * 8.0 + magnitude * 2.0 ** (3.0 - exponent)
        code, sign_bit = xp.where(magnitude < _LOWEST_NORMAL, magnitude * 512.0, normal), 128.0
    else:
        above_two = xp.where(magnitude <= 4, magnitude + 2.0, 7.0)
        code, sign_bit = xp.where(magnitude < 2, 2.0 * magnitude, above_two), 8.0
    return xp.where(value < 0, code + sign_bit, code)
