"""Attention over stored keys and values, each with a storage of its own.

A few queries read the codes directly; longer blocks unpack them and use the fused kernel, whose memory does
not grow with queries × keys. Never changes its caller's arrays. Called through
``patches.attention`` and by the caches' tests.
"""

import math
from typing import TypeGuard

import mlx.core as mx

from mlx_optiq_ext.kv.cuda import is_on_cuda
from mlx_optiq_ext.kv.stored import Exact, Stored, StoredInRows

__all__ = ["MAX_SHORT", "attend"]

MAX_SHORT = 8
"""Longest block of queries that reads codes directly (decoding, and checking a few drafted tokens)."""

_MAX_ROWS_CPU = 4
"""Query rows per key-value head up to which reading codes beats unpacking them on a CPU."""


def attend(
    queries: mx.array,
    keys: Stored,
    values: Stored,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale · Q·Kᵀ + mask)·V over stored keys and values; lazy.

    Args:
        queries: (B, Hq, L, D), Hq a multiple of the key-value heads; not changed.
        keys: (B, H, S, D).
        values: (B, H, S, Dv).
        scale: Multiplies the products.
        mask: None, "causal" (queries are the last L columns), bool (True attends) or additive, of a shape
            that broadcasts to (B, Hq, L, S).
        sinks: (Hq,) logits that take part in the softmax and have no value, or None.
    Returns:
        (B, Hq, L, Dv) in the dtype of ``queries``.
    Source: scores of centred keys differ from the model's by a constant per query, which softmax does not
        see (only ``sinks`` do, so there it is added back); Q·R and K·R have the products of Q and K.
    """
    if _kernels_read(keys, values, queries.shape[2]):
        sinks = None if sinks is None else _shifted_sinks(queries, keys, scale, sinks)
        return keys.rows.attend(keys.words, queries, scale, mask, sinks, keys.take_counters())
    turned = keys.codec.turn(queries)
    scale = scale * keys.codec.product_scale
    packed = keys.codec.is_packed or values.codec.is_packed
    if packed and queries.shape[2] <= MAX_SHORT and not unpacks_always():
        shift = _shift(queries, keys) if sinks is not None else None
        out = _short(turned, keys, values, scale, _Bias(mask, sinks, shift))
    else:
        out = _long(turned, keys, values, scale, mask, sinks)
    return values.codec.turn_back(out).astype(queries.dtype)


def _kernels_read(keys: Stored, values: Stored, num_queries: int) -> TypeGuard[StoredInRows]:
    """Whether kernels of our own attend to these: few queries, keys and values in the same rows, on CUDA."""
    return (
        isinstance(keys, StoredInRows)
        and isinstance(values, StoredInRows)
        and keys.words is values.words
        and num_queries <= MAX_SHORT
        and is_on_cuda()
    )


def _shifted_sinks(queries: mx.array, keys: Stored, scale: float, sinks: mx.array) -> mx.array:
    """Sinks (B, Hq, L) beside scores of centred keys: what centring takes off those is taken off these."""
    batch, num_queries, length, dim = queries.shape
    logits = mx.broadcast_to(sinks.astype(mx.float32)[None, :, None], (batch, num_queries, length))
    if keys.codec.mean is None:
        return logits
    grouped = queries.reshape(batch, keys.shape[1], -1, dim).astype(mx.float32)
    products = (grouped * keys.codec.mean_as(mx.float32)).sum(axis=-1)
    return logits - scale * products.reshape(logits.shape)


def unpacks_always() -> bool:
    """Whether codes are never read directly: on CUDA.

    Measured with MLX 0.32.4 on an H100: products with codes of 8 bits in groups of 128 came out wrong, and
    those in bfloat16 did not return. Unpacking one layer for the fused kernel is exact.
    """
    return is_on_cuda()


class _Bias:
    """Everything that is added to the scores."""

    __slots__ = ("mask", "shift", "sinks")

    def __init__(self, mask: mx.array | str | None, sinks: mx.array | None, shift: mx.array | None) -> None:
        self.mask, self.sinks, self.shift = mask, sinks, shift


def _long(
    queries: mx.array,
    keys: Stored,
    values: Stored,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    numbers = keys.numbers(queries.dtype)
    if sinks is not None and keys.codec.mean is not None:
        numbers = numbers + keys.codec.turn(keys.codec.mean_as(numbers.dtype))
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(queries.dtype)
    return mx.fast.scaled_dot_product_attention(
        queries,
        numbers,
        values.numbers(queries.dtype),
        scale=scale,
        mask=mask,
        sinks=sinks,
    )


def _shift(queries: mx.array, keys: Stored) -> mx.array | None:
    """Queries · mean, (B, Hq, L, 1): what centring took off the products, in stored coordinates' scale."""
    if keys.codec.mean is None:
        return None
    batch, num_queries, length, dim = queries.shape
    heads = keys.shape[1]
    grouped = queries.reshape(batch, heads, num_queries // heads * length, dim).astype(mx.float32)
    products = grouped @ keys.codec.mean_as(mx.float32).swapaxes(-1, -2)
    return products.reshape(batch, num_queries, length, 1) / keys.codec.product_scale


def _short(queries: mx.array, keys: Stored, values: Stored, scale: float, bias: _Bias) -> mx.array:
    """Scores and weighted sums by key-value head; float32 between the products."""
    batch, num_queries, length, dim = queries.shape
    heads, columns = keys.shape[1:3]
    rows = num_queries // heads * length
    on_cpu = _on_cpu()
    # A CPU multiplies 16-bit numbers and codes many times slower than float32, and less exactly.
    grouped = queries.reshape(batch, heads, rows, dim).astype(mx.float32 if on_cpu else queries.dtype)
    read_codes = not on_cpu or rows <= _MAX_ROWS_CPU
    # Products that float16 cannot hold are scaled down before, by a power of two: that rounds nothing.
    factor = 2.0 ** math.floor(math.log2(scale)) if grouped.dtype == mx.float16 and 0 < scale < 1 else 1.0
    scores = _scores(grouped * factor if factor != 1 else grouped, keys, read_codes).astype(mx.float32)
    scores = scores.reshape(batch, num_queries, length, columns) * (scale / factor)
    if bias.shift is not None:
        scores = scores + bias.shift * scale
    scores = _masked(scores, bias.mask)
    if bias.sinks is not None:
        sink = mx.broadcast_to(
            bias.sinks.astype(scores.dtype)[None, :, None, None], (batch, num_queries, length, 1)
        )
        weights = mx.softmax(mx.concatenate([sink, scores], axis=-1), axis=-1)[..., 1:]
    else:
        weights = mx.softmax(scores, axis=-1)
    weights = weights.reshape(batch, heads, rows, columns).astype(grouped.dtype)
    return _weighted(weights, values, read_codes).reshape(batch, num_queries, length, values.codec.dim)


def _on_cpu() -> bool:
    return mx.default_device() == mx.cpu


def _scores(grouped: mx.array, keys: Stored, read_codes: bool) -> mx.array:
    """Products of queries (B, H, M, D) with every key: (B, H, M, S)."""
    codec, columns = keys.codec, keys.shape[2]
    if not (codec.is_packed and read_codes):
        return grouped @ keys.numbers(grouped.dtype).swapaxes(-1, -2)
    scores = codec.product(grouped, keys.parts, transpose=True)
    if keys.exact is None:
        return scores
    exact = grouped @ keys.exact.numbers.swapaxes(-1, -2).astype(grouped.dtype)
    if keys.exact.spill:
        scores = _with_spare_column(scores)
    return mx.put_along_axis(scores, _columns(keys.exact, scores), exact, axis=-1)[..., :columns]


def _weighted(weights: mx.array, values: Stored, read_codes: bool) -> mx.array:
    """Weights (B, H, M, S) times values: (B, H, M, Dv)."""
    codec, columns = values.codec, values.shape[2]
    if not (codec.is_packed and read_codes):
        return weights @ values.numbers(weights.dtype)
    added: mx.array | None = None
    if values.exact is not None:
        if values.exact.spill:
            weights = _with_spare_column(weights)
        where = _columns(values.exact, weights)
        taken = mx.take_along_axis(weights, where, axis=-1)
        added = taken @ values.exact.numbers.astype(weights.dtype)
        weights = mx.put_along_axis(weights, where, mx.zeros_like(taken), axis=-1)[..., :columns]
    out = codec.product(weights, values.parts, transpose=False)
    return out if added is None else out + added


def _columns(exact: Exact, scores: mx.array) -> mx.array:
    """Column numbers of exact entries for every row of scores: (B, H, M, E)."""
    shape = (*scores.shape[:3], exact.columns.shape[-1])
    return mx.broadcast_to(exact.columns[:, None, None, :], shape)


def _with_spare_column(scores: mx.array) -> mx.array:
    """A column of zeros on the right, which entries that do not exist name."""
    return mx.pad(scores, [(0, 0), (0, 0), (0, 0), (0, 1)])


def _masked(scores: mx.array, mask: mx.array | str | None) -> mx.array:
    if mask is None:
        return scores
    if isinstance(mask, str):
        length, columns = scores.shape[-2:]
        if length == 1:
            return scores
        mask = mx.arange(columns - length, columns)[:, None] >= mx.arange(columns)[None]
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    return scores + mask.astype(scores.dtype)
