"""Second-order statistics of one quantizable tensor, and the divergence that a weight error costs.

For a linear with inputs x_t and output gradients g_t of the sampled loss, the diagonal Fisher is
F = E_t[g_t² x_tᵀ²] and an error E costs ½ Σ F_ij E_ij² nats per token. F is formed for a few rows at a time,
used, and dropped; what survives is one number per choice and window. Knows nothing of how errors arise.
Source: diagonal Fisher of the sampled (true) distribution, as in Martens, "New insights and perspectives on
the natural gradient method" (2020), §§ 5, 9; quadratic form of the KL divergence, ibid. eq. 6.
"""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.measure.moments import (
    PRIOR_HITS,
    ExpertGrams,
    expert_importance,
    routed_inputs,
    windows_of,
)
from mlx_optiq_ext.models.taps import Capture

__all__ = [
    "EmbeddingStatistics",
    "ExpertStatistics",
    "LinearStatistics",
    "UnitStatistics",
    "statistics_of",
]

Floats = npt.NDArray[np.float64]


class UnitStatistics(Protocol):
    """What one tensor's captures tell about it."""

    by_gradient: bool
    """True where :meth:`importance` is of output gradients, which whoever only sees inputs cannot know."""

    def importance(self) -> mx.array:
        """E[x_j²] per input column: (I,), or (E, I) for experts; float32."""
        ...

    def gram(self, experts: Sequence[int] | None = None, *, half: int | None = None) -> mx.array | None:
        """E[x xᵀ]: (I, I), or (E, I, I) for experts; float32.

        Args:
            experts: Which experts; None is all, E·I² floats.
            half: From one half of the windows (:func:`~mlx_optiq_ext.measure.moments.windows_of`).
        Returns:
            None where no input runs along the last axis, so that the writer has no Gram either.
        """
        ...

    def divergence(self, start: int, errors: list[mx.array]) -> Floats:
        """Cost of errors in the rows (experts, embedding rows) from ``start`` on.

        Args:
            start: First row, or first expert.
            errors: One error per choice, each (n, I), or (n, O, I) for experts; float32.
        Returns:
            (C, W) nats per token of each window.
        """
        ...


class LinearStatistics:
    """Statistics of an ordinary linear; evaluates.

    Args:
        x: Inputs per item, each (n, I).
        g: Output gradients per item, each (n, O).
        windows: Window of each item.
        num_tokens: Tokens that the loss was summed over in all passes (T · W · samples).
        num_windows: W.
    """

    def __init__(
        self, x: list[mx.array], g: list[mx.array], windows: list[int], num_tokens: int, num_windows: int
    ) -> None:
        self._x = [a.astype(mx.float32) for a in x]
        self._g2 = [mx.square(a.astype(mx.float32)) for a in g]
        mx.eval(self._x, self._g2)
        self._windows = windows
        self._scale = 0.5 * num_windows / num_tokens
        self._num_windows = num_windows
        self.by_gradient = False

    def importance(self) -> mx.array:
        """E[x_j²] (I,)."""
        rows = sum(a.shape[0] for a in self._x)
        return mx.stack([mx.sum(mx.square(a), axis=0) for a in self._x]).sum(axis=0) / rows

    def gram(
        self,
        experts: Sequence[int] | None = None,  # noqa: ARG002
        *,
        half: int | None = None,
    ) -> mx.array:
        """E[x xᵀ] (I, I)."""
        kept = windows_of(self._num_windows, half)
        x = mx.concatenate([a for a, w in zip(self._x, self._windows, strict=True) if w in kept] or self._x)
        return (x.T @ x) / x.shape[0]

    def divergence(self, start: int, errors: list[mx.array]) -> Floats:
        """See :meth:`UnitStatistics.divergence`; evaluates. Memory: (W + C) copies of the rows."""
        stop = start + errors[0].shape[0]
        squared = mx.stack([mx.square(e).reshape(-1) for e in errors])
        result = np.zeros((len(errors), self._num_windows))
        for x, g2, window in zip(self._x, self._g2, self._windows, strict=True):
            fisher = (g2[:, start:stop].T @ mx.square(x)).reshape(-1)
            result[:, window] += self._scale * np.array(squared @ fisher, dtype=np.float64)
        return result


class ExpertStatistics:
    """Statistics of experts (or heads) that share one tensor (E, O, I); only routed rows count.

    Args:
        x: Routed inputs per item, each (n, I).
        g: Gradients per item, each (n, O).
        experts: Expert of each row per item, each (n,).
        windows: Window of each item.
        num_tokens: Tokens of all passes (T · W · samples).
        num_windows: W.
        num_experts: E.
        by_gradient: ``x`` and ``g`` have changed places (the tensor is used as x @ W).
    """

    def __init__(
        self,
        x: list[mx.array],
        g: list[mx.array],
        experts: list[npt.NDArray[np.int64]],
        windows: list[int],
        num_tokens: int,
        num_windows: int,
        num_experts: int,
        by_gradient: bool = False,
    ) -> None:
        self.by_gradient = by_gradient
        self._x = mx.concatenate(x).astype(mx.float32)
        self._g2 = mx.square(mx.concatenate(g).astype(mx.float32))
        mx.eval(self._x, self._g2)
        owner = np.concatenate(experts)
        window = np.concatenate([np.full(len(e), w) for e, w in zip(experts, windows, strict=True)])
        self._rows = [np.flatnonzero(owner == e) for e in range(num_experts)]
        self._window = window
        self._num_windows = num_windows
        hits = len(owner)
        self._scale = 0.5 * num_windows * (hits / num_tokens) / (hits + num_experts * PRIOR_HITS)
        self._mean_fisher = (self._g2.T @ mx.square(self._x)) / max(hits, 1)

    @property
    def hits(self) -> list[int]:
        """Routed rows per expert: the coverage."""
        return [len(rows) for rows in self._rows]

    def importance(self) -> mx.array:
        """E[x_j²] per expert (E, I), rarely used experts pulled towards the mean of all.

        With ``by_gradient`` one for all (I,): it is stored for the writer.
        """
        if self.by_gradient:
            return mx.mean(mx.square(self._x), axis=0)
        return expert_importance(self._x, self._rows)

    def gram(self, experts: Sequence[int] | None = None, *, half: int | None = None) -> mx.array | None:
        """E[x xᵀ] per expert (E, I, I), pulled towards the mean of all as in :meth:`importance`."""
        if self.by_gradient:
            return None
        x, rows = self._x, self._rows
        if half is not None:
            kept = np.flatnonzero(np.isin(self._window, windows_of(self._num_windows, half)))
            x, rows = x[mx.array(kept)], [np.flatnonzero(np.isin(kept, own)) for own in rows]
        return ExpertGrams(x, rows).of(range(len(rows)) if experts is None else experts)

    def divergence(self, start: int, errors: list[mx.array]) -> Floats:
        """See :meth:`UnitStatistics.divergence`; evaluates."""
        result = np.zeros((len(errors), self._num_windows))
        squared = [mx.square(e) for e in errors]
        width = errors[0].shape[1]
        for e in range(errors[0].shape[0]):
            own = mx.stack([s[e] for s in squared])
            prior = np.array(mx.sum(own * self._mean_fisher, axis=(1, 2)), dtype=np.float64)
            result += (self._scale * PRIOR_HITS / self._num_windows) * prior[:, None]
            rows = self._rows[start + e]
            if not len(rows):
                continue
            pick = mx.array(rows)
            outputs = (mx.square(self._x[pick]) @ own.reshape(-1, own.shape[-1]).T).reshape(
                len(rows), -1, width
            )
            cost = np.array(mx.sum(outputs * self._g2[pick][:, None, :], axis=-1), dtype=np.float64)
            np.add.at(result.T, self._window[rows], self._scale * cost)
        return result


class EmbeddingStatistics:
    """Statistics of an embedding table on its input side: only rows that were looked up count.

    Args:
        ids: Token ids per item, each (n,).
        g: Gradients of the looked-up rows per item, each (n, D).
        windows: Window of each item.
        num_tokens: Tokens of all passes (T · W · samples).
        num_windows: W.
    """

    def __init__(
        self,
        ids: list[npt.NDArray[np.int64]],
        g: list[mx.array],
        windows: list[int],
        num_tokens: int,
        num_windows: int,
    ) -> None:
        self.by_gradient = True
        self._ids = np.concatenate(ids)
        self._g2 = mx.square(mx.concatenate(g).astype(mx.float32))
        self._window = np.concatenate([np.full(len(i), w) for i, w in zip(ids, windows, strict=True)])
        self._num_windows = num_windows
        self._scale = 0.5 * num_windows / num_tokens

    def importance(self) -> mx.array:
        """E[g_j²] per column (D,): how much an error in that column of a row is felt."""
        return mx.mean(self._g2, axis=0)

    def gram(
        self,
        experts: Sequence[int] | None = None,  # noqa: ARG002
        *,
        half: int | None = None,  # noqa: ARG002
    ) -> mx.array | None:
        """None: lookups do not mix columns, so there is nothing to feed back."""
        return None

    def divergence(self, start: int, errors: list[mx.array]) -> Floats:
        """See :meth:`UnitStatistics.divergence`; evaluates."""
        result = np.zeros((len(errors), self._num_windows))
        here = np.flatnonzero((self._ids >= start) & (self._ids < start + errors[0].shape[0]))
        if not len(here):
            return result
        rows, g2 = mx.array(self._ids[here] - start), self._g2[mx.array(here)]
        for c, error in enumerate(errors):
            cost = np.array(mx.sum(mx.square(error[rows]) * g2, axis=-1), dtype=np.float64)
            np.add.at(result[c], self._window[here], self._scale * cost)
        return result


def statistics_of(
    captures: list[tuple[int, Capture]], weight_shape: tuple[int, ...], num_tokens: int, num_windows: int
) -> UnitStatistics:
    """Choose and build the statistics for one tensor from all its captures.

    Args:
        captures: (window, capture) of every item; a module called twice appears twice.
        weight_shape: (O, I), or (E, O, I).
        num_tokens: Tokens of all passes (T · W · samples). Not counted from the captures: a module that
            runs twice in a pass has twice as many, and costs the sum of both.
        num_windows: W.
    """
    windows = [w for w, _ in captures]
    first = captures[0][1].call
    if mx.issubdtype(first.x.dtype, mx.integer):
        ids = [np.array(c.call.x, dtype=np.int64).reshape(-1) for _, c in captures]
        gradients = [c.g.reshape(-1, c.g.shape[-1]) for _, c in captures]
        return EmbeddingStatistics(ids, gradients, windows, num_tokens, num_windows)
    if len(weight_shape) == 2:
        xs = [c.call.x.reshape(-1, c.call.x.shape[-1]) for _, c in captures]
        gs = [c.g.reshape(-1, c.g.shape[-1]) for _, c in captures]
        return LinearStatistics(xs, gs, windows, num_tokens, num_windows)
    rows = [
        _routed_rows(c) if c.call.experts is not None else _head_rows(c, weight_shape[0]) for _, c in captures
    ]
    return ExpertStatistics(
        [x for x, _, _ in rows], [g for _, g, _ in rows], [e for _, _, e in rows],
        windows, num_tokens, num_windows, weight_shape[0], by_gradient=first.transposed,
    )  # fmt: skip


def _routed_rows(capture: Capture) -> tuple[mx.array, mx.array, npt.NDArray[np.int64]]:
    """Inputs (n, I), gradients (n, O) and experts (n,) of a switch layer's call."""
    x, experts = routed_inputs(capture.call)
    return x, capture.g.reshape(-1, capture.g.shape[-1]), experts


def _head_rows(capture: Capture, num_heads: int) -> tuple[mx.array, mx.array, npt.NDArray[np.int64]]:
    """The same for per-head linears: x (B, H or 1, T, I), g (B, H, T, O); swapped where x @ W."""
    g = capture.g
    x = mx.broadcast_to(capture.call.x, (*g.shape[:-1], capture.call.x.shape[-1]))
    axis = next(a for a in range(g.ndim - 1) if g.shape[a] == num_heads)
    heads = np.broadcast_to(
        np.arange(num_heads).reshape([-1 if a == axis else 1 for a in range(g.ndim - 1)]), g.shape[:-1]
    )
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return (g, x, heads.reshape(-1)) if capture.call.transposed else (x, g, heads.reshape(-1))
