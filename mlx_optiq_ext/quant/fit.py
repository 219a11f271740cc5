"""Scales and biases that minimise the importance-weighted rounding error of each group.

Works on float32 arrays of NumPy or MLX alike (``xp`` is the module). Knows nothing of layouts, files or
Grams. Called by ``correct`` for whole tensors and by ``gptq`` for one group of columns at a time.
"""

from typing import Any, TypeAlias

import mlx.core as mx
import msgspec
import numpy as np

__all__ = ["Array", "Groups", "edge_groups", "fit_groups", "nearest_codes", "round_stored", "weighted_square"]

Array: TypeAlias = Any
"""A float32 ``numpy.ndarray`` or ``mlx.core.array``: every function here takes either, never mixed."""

_GRID = 4
"""Clip positions per end of a group's range; every pair is screened."""
_ALTERNATIONS = 2
"""Refits of the winner."""
_TINY = 1e-30


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Scale and bias of every group, each of shape (R, G), holding values the stored dtype can represent."""

    scale: Array
    bias: Array


class _Moments(msgspec.Struct, frozen=True, kw_only=True):
    """Importance-weighted sums over a group, u being the residual in code units; each (R, G)."""

    q: Array
    qq: Array
    u: Array
    uq: Array
    uu: Array


def fit_groups(
    weight: Array,
    importance: Array,
    start: Groups,
    *,
    bits: int,
    dtype: mx.Dtype,
    xp: Any,
) -> Groups:
    """Choose scale and bias per group so that Σ_j a_j (w_j − scale·q_j − bias)² is small.

    A grid of clip ranges is screened by the error each would have after one least-squares refit with its
    codes held; the winner alternates between rounding the codes and refitting, with scale and bias rounded
    to ``dtype`` before every comparison. ``start`` is kept where nothing beats it.

    Args:
        weight: (R, G, group_size) float32.
        importance: a_j > 0, broadcastable to ``weight``.
        start: Parameters to beat, normally those of ``mx.quantize``.
        bits: Width of a code.
        dtype: Stored type of scales and biases.
        xp: ``numpy`` or ``mlx.core``, whichever made the arrays.
    Cost: about 20 passes over the weights, about a dozen elementwise steps each.
    Source: METHOD.md §4; weighted least squares over fixed codes, as in importance-matrix quantizers.
    """
    last = (1 << bits) - 1
    importance = xp.broadcast_to(importance, weight.shape)
    total = importance.sum(-1)
    best = start
    best_error = weighted_square(weight, importance, start, last, xp)
    candidate = _screen(weight, importance, total, start, last, xp)
    for step in range(_ALTERNATIONS + 1):
        candidate = _round_groups(candidate, best, dtype, xp)
        moments = _moments(weight, importance, candidate, last, xp)
        error = moments.uu * candidate.scale * candidate.scale
        better = error < best_error
        best = _select(better, candidate, best, xp)
        best_error = xp.where(better, error, best_error)
        if step < _ALTERNATIONS:
            candidate = _refit(candidate, moments, total, dtype, xp)
    return best


def edge_groups(weight: Array, *, bits: int, dtype: mx.Dtype, xp: Any) -> Groups:
    """Parameters by the rule of ``mx.quantize``: one edge exact, zero on the grid, rounded to ``dtype``.

    Args:
        weight: (R, G, group_size) float32.
    Source: MLX, affine ``quantize``: the scale is bent so that the edge of larger magnitude is a whole
        number of steps from zero.
    """
    low, high = weight.min(-1), weight.max(-1)
    low_is_edge = xp.abs(low) > xp.abs(high)
    step = xp.maximum((high - low) / ((1 << bits) - 1), 1e-7)
    step = xp.where(low_is_edge, step, -step)
    edge = xp.where(low_is_edge, low, high)
    count = xp.round(edge / step)
    on_grid = count != 0
    scale = xp.where(on_grid, edge / xp.where(on_grid, count, 1.0), step)
    groups = Groups(scale=scale, bias=xp.where(on_grid, edge, 0.0))
    fallback = Groups(scale=xp.ones_like(scale), bias=xp.zeros_like(scale))
    return _round_groups(groups, fallback, dtype, xp)


def nearest_codes(weight: Array, groups: Groups, last: int, xp: Any) -> Array:
    """Code of every weight under its group's parameters, as float32 integers in 0..last."""
    return xp.clip(xp.round(_positions(weight, groups)), 0, last)


def weighted_square(weight: Array, importance: Array, groups: Groups, last: int, xp: Any) -> Array:
    """Σ_j a_j (w_j − ŵ_j)² per group under nearest codes, shape (R, G)."""
    position = _positions(weight, groups)
    position -= xp.clip(xp.round(position), 0, last)
    return _dot(importance * position, position, xp) * groups.scale * groups.scale


def round_stored(values: Array, dtype: mx.Dtype, xp: Any) -> Array:
    """Round float32 values to ``dtype`` (nearest, ties to even) and widen them again."""
    if dtype == mx.float32:
        return values
    if xp is mx:
        return values.astype(dtype).astype(mx.float32)
    if dtype == mx.float16:
        return values.astype(np.float16).astype(np.float32)
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return word.view(np.float32)


def _positions(weight: Array, groups: Groups) -> Array:
    """Where each weight lies on its group's grid of codes, unrounded."""
    inverse = 1.0 / groups.scale
    position = weight * inverse[..., None]
    position -= (groups.bias * inverse)[..., None]
    return position


def _dot(left: Array, right: Array, xp: Any) -> Array:
    """Sum over the last axis of the product."""
    if xp is mx:
        return (left * right).sum(-1)
    return np.einsum("rgj,rgj->rg", left, right)


def _moments(weight: Array, importance: Array, groups: Groups, last: int, xp: Any) -> _Moments:
    residual = _positions(weight, groups)
    codes = xp.clip(xp.round(residual), 0, last)
    residual -= codes
    weighted_residual = importance * residual
    return _Moments(
        q=_dot(importance, codes, xp),
        qq=_dot(importance * codes, codes, xp),
        u=_dot(importance, residual, xp),
        uq=_dot(weighted_residual, codes, xp),
        uu=_dot(weighted_residual, residual, xp),
    )


def _screen(weight: Array, importance: Array, total: Array, start: Groups, last: int, xp: Any) -> Groups:
    """Best of the clip grid by the error left after an exact least-squares refit; not yet rounded."""
    low, high = weight.min(-1), weight.max(-1)
    step = (high - low) / last
    best, best_error = start, None
    for clip_low in _clip_steps(last):
        for clip_high in _clip_steps(last):
            bias = low + clip_low * step
            scale = xp.maximum((high - clip_high * step - bias) / last, _TINY)
            groups = Groups(scale=scale, bias=bias)
            moments = _moments(weight, importance, groups, last, xp)
            mean_q = moments.q / total
            variance = xp.maximum(moments.qq - mean_q * moments.q, _TINY)
            covariance = moments.uq - mean_q * moments.u
            slope = covariance / variance
            left = moments.uu - moments.u * moments.u / total - covariance * slope
            error = left * scale * scale
            refitted = Groups(
                scale=scale * (1.0 + slope),
                bias=bias + scale * (moments.u / total - slope * mean_q),
            )
            if best_error is None:
                best, best_error = refitted, error
            else:
                better = error < best_error
                best = _select(better, refitted, best, xp)
                best_error = xp.where(better, error, best_error)
    return best


def _clip_steps(last: int) -> list[float]:
    """How many code steps to cut off one end of the range; slightly negative widens it."""
    widest = 0.2 + 0.3 * last.bit_length()
    return [-0.2 + (widest + 0.2) * k / (_GRID - 1) for k in range(_GRID)]


def _refit(groups: Groups, moments: _Moments, total: Array, dtype: mx.Dtype, xp: Any) -> Groups:
    """Weighted least squares over fixed codes; the bias is solved for the scale as it will be stored."""
    mean_q = moments.q / total
    variance = xp.maximum(moments.qq - mean_q * moments.q, _TINY)
    slope = (moments.uq - mean_q * moments.u) / variance
    scale = round_stored(groups.scale * (1.0 + slope), dtype, xp)
    shift = (groups.scale * moments.u - (scale - groups.scale) * moments.q) / total
    return Groups(scale=scale, bias=groups.bias + shift)


def _round_groups(groups: Groups, fallback: Groups, dtype: mx.Dtype, xp: Any) -> Groups:
    """Stored-precision parameters; ``fallback`` where the scale would be zero or not finite."""
    scale, bias = round_stored(groups.scale, dtype, xp), round_stored(groups.bias, dtype, xp)
    usable = (xp.abs(scale) > 0) & xp.isfinite(scale) & xp.isfinite(bias)
    return _select(usable, Groups(scale=scale, bias=bias), fallback, xp)


def _select(mask: Array, yes: Groups, no: Groups, xp: Any) -> Groups:
    return Groups(scale=xp.where(mask, yes.scale, no.scale), bias=xp.where(mask, yes.bias, no.bias))
