"""Caches of random tokens, and attention over what they hold, in float64."""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.store import Layout

__all__ = ["HEADS", "exact_attention", "filled", "make_mask"]

HEADS = 2


def filled(
    rng: np.random.Generator, layout: Layout, batch: int, columns: int, dtype: mx.Dtype = mx.float32
) -> tuple[MixedKVCache, Any, Any]:
    """A cache of random tokens that came in two blocks, and the numbers that went in."""
    offset = rng.standard_normal((HEADS, 1, layout.key.dim))
    keys = (rng.standard_normal((batch, HEADS, columns, layout.key.dim)) + offset).astype(np.float32)
    values = rng.standard_normal((batch, HEADS, columns, layout.value.dim)).astype(np.float32)
    cache = MixedKVCache(layout)
    cut = int(rng.integers(1, columns + 1))
    for piece in (slice(0, cut), slice(cut, columns)):
        if piece.start < piece.stop:
            cache.update_and_fetch(*(mx.array(x[:, :, piece]).astype(dtype) for x in (keys, values)))
    cache._show(columns)
    return cache, keys, values


def exact_attention(
    queries: np.ndarray, keys: Any, values: Any, scale: float, mask: Any, sinks: np.ndarray | None
) -> np.ndarray:
    """Float64 attention over unpacked keys and values."""
    num_queries, length = queries.shape[1:3]
    repeats = num_queries // HEADS
    k = np.repeat(np.array(keys.restored().astype(mx.float32), dtype=np.float64), repeats, axis=1)
    v = np.repeat(np.array(values.restored().astype(mx.float32), dtype=np.float64), repeats, axis=1)
    scores = scale * queries.astype(np.float64) @ k.swapaxes(-1, -2)
    columns = k.shape[2]
    if isinstance(mask, str):
        mask = np.arange(columns - length, columns)[:, None] >= np.arange(columns)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64)[None, :, None, None] - top)
    return (weights / total) @ v


def make_mask(rng: np.random.Generator, kind: str, batch: int, length: int, columns: int) -> Any:
    """Column 0 is always seen, so that no row of the softmax is empty."""
    if kind in ("none", "causal"):
        return None if kind == "none" else "causal"
    shape = (length, columns) if kind in ("shared", "additive") else (batch, 1, length, columns)
    seen = rng.random(shape) < 0.6
    seen[..., 0] = True
    if kind == "additive":
        return np.where(seen, rng.standard_normal(shape), -1e9).astype(np.float32)
    return seen
