"""Second moments of what goes into a tensor: the weights of the rounding error in ``quant.correct``.

Knows calls of modules, not gradients. Called by ``statistics`` and, while converting, by ``quant.convert``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.models.taps import Call

__all__ = [
    "PRIOR_HITS",
    "ExpertGrams",
    "Moments",
    "expert_importance",
    "input_moments",
    "routed_inputs",
    "windows_of",
]

PRIOR_HITS = 4.0
"""Pseudo-observations that pull a rarely used expert towards the mean of its layer."""
Rows = Sequence[npt.NDArray[np.int64]]


class ExpertGrams:
    """E[x xᵀ] of experts, pulled as in :func:`expert_importance`; each is built when it is asked for.

    All at once they are E·I² floats, gigabytes for large models.

    Args:
        x: Routed inputs (n, I), float32.
        rows: Row numbers of each expert.
    """

    def __init__(self, x: mx.array, rows: Rows) -> None:
        self._x = x
        self._rows = rows
        self._mean = (x.T @ x) / max(x.shape[0], 1)

    def of(self, experts: Sequence[int]) -> mx.array:
        """Grams of some experts, (len(experts), I, I); lazy."""
        return mx.stack([self._gram(self._rows[e]) for e in experts])

    def _gram(self, rows: npt.NDArray[np.int64]) -> mx.array:
        if not len(rows):
            return self._mean
        routed = self._x[mx.array(rows)]
        return (routed.T @ routed + PRIOR_HITS * self._mean) / (len(rows) + PRIOR_HITS)


class Moments(NamedTuple):
    """E[x_j²] and, where wanted, E[x xᵀ] of a tensor's inputs, float32."""

    importance: mx.array
    """(I,), or (E, I) for experts."""
    gram: mx.array | ExpertGrams | None
    """(I, I), or those of experts."""

    def of_rows(self, start: int, stop: int) -> tuple[mx.array, mx.array | None]:
        """Importance and Gram that belong to some rows (experts) of the tensor."""
        importance = self.importance[start:stop] if self.importance.ndim == 2 else self.importance
        gram = self.gram.of(range(start, stop)) if isinstance(self.gram, ExpertGrams) else self.gram
        return importance, gram


def input_moments(calls: Sequence[Call], weight_shape: tuple[int, ...], *, want_gram: bool) -> Moments | None:
    """Moments of one tensor's inputs over all its calls; evaluated but for the experts' Grams.

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
        moments = Moments(expert_importance(x, rows), ExpertGrams(x, rows) if want_gram else None)
    mx.eval([m for m in moments if isinstance(m, mx.array)])
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


def windows_of(num_windows: int, half: int | None) -> range:
    """All windows, or their first (0) or second (1) half; a single window is both halves.

    Windows of the domains take turns, so that every domain is in both halves.
    """
    if half is None or num_windows < 2:
        return range(num_windows)
    middle = (num_windows + 1) // 2
    return range(middle) if half == 0 else range(middle, num_windows)


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
