"""Second moments of what goes into a tensor: the weights of the rounding error in ``quant.correct``.

Knows calls of modules, not gradients. Called by ``statistics`` and, while converting, by ``quant.convert``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.models.taps import Call

__all__ = ["PRIOR_HITS", "Moments", "expert_grams", "expert_importance", "input_moments", "routed_inputs"]

PRIOR_HITS = 4.0
"""Pseudo-observations that pull a rarely used expert towards the mean of its layer."""
Rows = Sequence[npt.NDArray[np.int64]]


class Moments(NamedTuple):
    """E[x_j²] and, where wanted, E[x xᵀ] of a tensor's inputs, float32."""

    importance: mx.array
    """(I,), or (E, I) for experts."""
    gram: mx.array | None
    """(I, I), or (E, I, I)."""


def input_moments(calls: Sequence[Call], weight_shape: tuple[int, ...], *, want_gram: bool) -> Moments | None:
    """Moments of one tensor's inputs over all its calls; evaluated.

    Returns:
        None where the last axis of the weight is not an input axis (MLA heads used as x @ W), or the
        input is token ids.
    """
    if mx.issubdtype(calls[0].x.dtype, mx.integer) or calls[0].transposed:
        return None
    if len(weight_shape) == 2:
        moments = _plain_moments(calls, weight_shape[-1], want_gram=want_gram)
    else:
        inputs = [
            routed_inputs(call) if call.experts is not None else _head_inputs(call, weight_shape[0])
            for call in calls
        ]
        x = mx.concatenate([rows for rows, _ in inputs]).astype(mx.float32)
        owner = np.concatenate([experts for _, experts in inputs])
        rows = [np.flatnonzero(owner == e) for e in range(weight_shape[0])]
        moments = Moments(expert_importance(x, rows), expert_grams(x, rows) if want_gram else None)
    mx.eval([m for m in moments if m is not None])
    return moments


def _plain_moments(calls: Sequence[Call], width: int, *, want_gram: bool) -> Moments:
    """Moments of an ordinary linear's inputs, summed call by call: only one call's squares are held."""
    num_rows = sum(call.x.size // width for call in calls)
    squares = mx.zeros(width)
    gram = mx.zeros((width, width)) if want_gram else None
    for call in calls:
        x = call.x.reshape(-1, width).astype(mx.float32)
        squares = squares + mx.sum(mx.square(x), axis=0)
        gram = gram + x.T @ x if gram is not None else None
        mx.eval([m for m in (squares, gram) if m is not None])
    return Moments(squares / num_rows, gram / num_rows if gram is not None else None)


def expert_importance(x: mx.array, rows: Rows) -> mx.array:
    """E[x_j²] per expert (E, I), rarely used experts pulled towards the mean of all; lazy.

    Args:
        x: Routed inputs (n, I), float32.
        rows: Row numbers of each expert.
    """
    mean = mx.mean(mx.square(x), axis=0)
    return mx.stack(
        [
            (mx.sum(mx.square(x[mx.array(own)]), axis=0) + PRIOR_HITS * mean) / (len(own) + PRIOR_HITS)
            if len(own)
            else mean
            for own in rows
        ]
    )


def expert_grams(x: mx.array, rows: Rows) -> mx.array:
    """E[x xᵀ] per expert (E, I, I), pulled as in :func:`expert_importance`; lazy."""
    mean = (x.T @ x) / x.shape[0]
    grams = []
    for own in rows:
        if not len(own):
            grams.append(mean)
            continue
        routed = x[mx.array(own)]
        grams.append((routed.T @ routed + PRIOR_HITS * mean) / (len(own) + PRIOR_HITS))
    return mx.stack(grams)


def routed_inputs(call: Call) -> tuple[mx.array, npt.NDArray[np.int64]]:
    """Inputs (n, I) and expert (n,) of every routed row of a switch layer's call, sorted or not."""
    assert call.experts is not None
    x = call.x.squeeze(-2)
    x = mx.broadcast_to(x, (*call.experts.shape, x.shape[-1])).reshape(-1, x.shape[-1])
    return x, np.array(call.experts, dtype=np.int64).reshape(-1)


def _head_inputs(call: Call, num_heads: int) -> tuple[mx.array, npt.NDArray[np.int64]]:
    """Inputs (n, I) and head (n,) of per-head linears: (B, H or 1, T, I) → rows."""
    batch, _, positions, width = call.x.shape
    x = mx.broadcast_to(call.x, (batch, num_heads, positions, width))
    heads = np.broadcast_to(np.arange(num_heads)[None, :, None], (batch, num_heads, positions))
    return x.reshape(-1, width), heads.reshape(-1).astype(np.int64)
