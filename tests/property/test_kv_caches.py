"""Whatever is done to caches, every query sees exactly its own row's tokens, each packed as if alone."""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_kv import HEADS, Ledger, Row, again

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.kv.batch import BatchMixedKVCache
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.store import GROWTH, Layout
from mlx_optiq_ext.types.quant import KEEP, Choice

_CHOICES = (KEEP, *(Choice(bits=bits, group_size=32) for bits in (2, 3, 4, 5, 6, 8)))


@st.composite
def _layouts(draw: st.DrawFn, kept: tuple[int, ...] = (0,)) -> Layout:
    window = draw(st.sampled_from([None, None, 5, 8, 20]))
    mean = mx.array(np.random.default_rng(5).standard_normal((HEADS, 32)).astype(np.float32))
    return Layout(
        Codec(
            draw(st.sampled_from(_CHOICES)),
            32,
            rotate=draw(st.booleans()),
            mean=mean if draw(st.booleans()) else None,
        ),
        Codec(draw(st.sampled_from(_CHOICES)), 64, rotate=draw(st.booleans())),
        window=window,
        first_kept=draw(st.sampled_from(kept)) if window is not None else 0,
        recent=draw(st.sampled_from([0, 0, 2, 7])),
        first=draw(st.sampled_from([0, 0, 3])),
        dense=draw(st.sampled_from([False, False, False, True])),
        joined=draw(st.booleans()),
    )


def _token_bytes(layout: Layout) -> int:
    """Float32 scales and biases, as the tokens of these tests."""
    codecs = (layout.key, layout.value)
    return sum(codec.choice.stored_bits(HEADS * codec.dim, float_bits=32) // 8 for codec in codecs)


def _check_single(cache: MixedKVCache, row: Row) -> None:
    total, window = len(row.tokens), row.layout.window
    assert cache.offset == total
    assert cache.size() == (total if window is None else min(total, window))
    assert cache.is_trimmable() == (window is None or total < window)
    assert cache.store.nbytes == cache.store.capacity * _token_bytes(row.layout)
    assert cache.nbytes == cache.store.nbytes + cache.ends.nbytes
    assert cache.store.used <= cache.store.capacity


_SINGLE = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "block", "trim", "copy", "state", "batch"]), st.integers(1, 9)
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(_layouts(kept=(0, 0, 2, 4)), _SINGLE, st.sampled_from([None, None, 3]), st.integers(0, 2**31))
def test_one_row_shows_every_token_packed_alone(
    layout: Layout, steps: list[tuple[str, int]], reach: int | None, seed: int
) -> None:
    ledger, cache, row = Ledger(layout, seed), MixedKVCache(layout), Row(layout)
    assert cache.empty()
    assert cache.nbytes == 0
    for action, count in steps:
        if action in ("step", "block"):
            count = 1 if action == "step" else count
            ledger.update(cache, [row], count, [count], reach)
        elif action == "trim" and cache.is_trimmable():
            count = min(count, len(row.tokens))
            assert cache.trim(count) == count
            row.trim(count)
        elif action == "copy":
            other, twin = copy.deepcopy(cache), row.copy()
            ledger.update(other, [twin], 3, [3], reach)
        elif action == "state":
            cache = again(cache)
        elif action == "batch" and not layout.first_kept:
            cache = MixedKVCache.merge([cache]).extract(0)
        _check_single(cache, row)


class _Batch:
    """A batched cache, its rows, and everything that can happen to them."""

    def __init__(self, layout: Layout, seed: int, reach: int | None) -> None:
        self.layout, self.reach, self.ledger = layout, reach, Ledger(layout, seed)
        self.rng = np.random.default_rng(seed + 1)
        self.cache, self.rows = self.fresh(3)

    def fresh(self, count: int) -> tuple[BatchMixedKVCache, list[Row]]:
        """Rows of different lengths, joined; some may be empty."""
        caches, rows = (
            [MixedKVCache(self.layout) for _ in range(count)],
            [Row(self.layout) for _ in range(count)],
        )
        for cache, row in zip(caches, rows, strict=True):
            for size in self.rng.integers(0, 12, 2).tolist():
                if size:
                    self.ledger.update(cache, [row], size, [size], self.reach)
        return MixedKVCache.merge(caches), rows

    def block(self, count: int) -> None:
        self.ledger.update(self.cache, self.rows, count, [count] * len(self.rows), self.reach)

    def padded(self, count: int) -> None:
        """Prefill rows of different lengths, padded on the right, in pieces."""
        lengths = [int(n) for n in self.rng.integers(1, count + 1, len(self.rows))]
        total, done = max(lengths), 0
        self.cache.prepare(lengths=lengths, right_padding=[total - n for n in lengths])
        while done < total:
            piece = min(int(self.rng.integers(1, 6)), total - done)
            real = [min(max(n - done, 0), piece) for n in lengths]
            self.ledger.update(self.cache, self.rows, piece, real, self.reach)
            done += piece
            if self.rng.random() < 0.3:
                self.cache = again(self.cache)
        self.cache.finalize()

    def left_padded(self, count: int) -> None:
        """Start over with rows that are padded on the left."""
        lengths = [int(n) for n in self.rng.integers(1, count + 1, len(self.rows))]
        total = max(lengths)
        self.cache = BatchMixedKVCache(self.layout, [0] * len(lengths))
        self.rows = [Row(self.layout) for _ in lengths]
        self.cache.prepare(left_padding=[total - n for n in lengths])
        spans = [(total - n, total) for n in lengths]
        self.ledger.update_columns(self.cache, self.rows, spans, total, self.reach)

    def extend(self, count: int) -> None:
        other, rows = self.fresh(1 + count % 2)
        self.cache.extend(other)
        self.rows = self.rows + rows

    def filter(self, count: int) -> None:
        kept = [int(i) for i in self.rng.permutation(len(self.rows))[: max(1, len(self.rows) - count % 3)]]
        self.cache.filter(mx.array(kept) if count % 2 else kept)
        self.rows = [self.rows[i] for i in kept]

    def extract(self, count: int) -> None:
        """Take all rows out, let each go on alone, and join them again."""
        alone = [self.cache.extract(i) for i in range(len(self.rows))]
        for cache, row in zip(alone, self.rows, strict=True):
            _check_single(cache, row)
            if count % 3 == 0:
                self.ledger.update(cache, [row], 1 + count % 4, [1 + count % 4], self.reach)
        self.cache = MixedKVCache.merge(alone)

    def trim(self, count: int) -> None:
        count = min([count, *(len(row.tokens) for row in self.rows)])
        if self.cache.is_trimmable():
            assert self.cache.trim(count) == count
            for row in self.rows:
                row.trim(count)

    def state(self, _: int) -> None:
        self.cache = again(self.cache)

    def copy(self, count: int) -> None:
        other, rows = copy.deepcopy(self.cache), [row.copy() for row in self.rows]
        self.ledger.update(other, rows, count, [count] * len(rows), self.reach)

    def check(self) -> None:
        cache, window, totals = self.cache, self.layout.window, [len(row.tokens) for row in self.rows]
        assert cache.offset.tolist() == totals
        assert cache.store.nbytes == cache.store.capacity * _token_bytes(self.layout) * (
            len(totals) if cache.store.parts else 1
        )
        assert cache.nbytes == cache.store.nbytes + cache.ends.nbytes
        assert cache.empty() == (not cache.store.parts)
        assert max(totals) <= cache.seen
        if window is None:
            assert cache.size() == cache.store.used >= max(totals)
        if cache.is_trimmable():
            assert max(totals) < (window or max(totals) + 1)


_ACTIONS = ("block", "padded", "left_padded", "extend", "filter", "extract", "trim", "state", "copy")
_BATCH = st.lists(st.tuples(st.sampled_from(_ACTIONS), st.integers(1, 9)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(_layouts(), _BATCH, st.sampled_from([None, None, 3]), st.integers(0, 2**31))
def test_rows_of_a_batch_show_what_they_show_alone(
    layout: Layout, steps: list[tuple[str, int]], reach: int | None, seed: int
) -> None:
    batch = _Batch(layout, seed, reach)
    for action, count in steps:
        getattr(batch, action)(count)
        batch.check()
        batch.block(1)
        batch.check()


def _plain(**kinds: Any) -> Layout:
    choice = Choice(bits=4, group_size=32)
    return Layout(Codec(choice, 32, rotate=True), Codec(choice, 64), **kinds)


def test_a_long_sliding_row_holds_little_more_than_its_window() -> None:
    layout = _plain(window=64)
    ledger, cache, row = Ledger(layout, 0), MixedKVCache(layout), Row(layout)
    ledger.update(cache, [row], 300, [300], None)
    assert cache.store.capacity == 300  # every query of the block needs its own window
    for _ in range(40):
        ledger.update(cache, [row], 1, [1], None)
        assert cache.store.capacity <= 64 + layout.slack
    assert cache.size() == 64


def test_a_growing_row_grows_by_whole_steps() -> None:
    layout = _plain()
    cache = MixedKVCache(layout)
    for expected in (GROWTH, 2 * GROWTH):
        cache.update_and_fetch(mx.zeros((1, HEADS, 200, 32)), mx.zeros((1, HEADS, 200, 64)))
        assert cache.store.capacity == expected
        assert cache.nbytes == expected * HEADS * ((32 + 64) * 4 // 8 + 8 * 3)


def test_leading_tokens_slide_out_of_a_batch_and_its_rows_join_fresh_ones() -> None:
    layout = _plain(window=8, first_kept=4)
    caches = [MixedKVCache(layout) for _ in range(2)]
    for cache, count in zip(caches, (20, 3), strict=True):
        cache.update_and_fetch(mx.zeros((1, HEADS, count, 32)), mx.zeros((1, HEADS, count, 64)))
    row = MixedKVCache.merge(caches).extract(0)
    assert row.layout.first_kept == 0
    joined = MixedKVCache.merge([row, MixedKVCache(layout)])
    assert joined.offset.tolist() == [20, 0]


def test_caches_of_different_storage_are_not_joined() -> None:
    one, other = MixedKVCache(_plain()), MixedKVCache(_plain(recent=4))
    with pytest.raises(UsageError, match=r"one kv_config\.json"):
        MixedKVCache.merge([one, other])
    with pytest.raises(UsageError, match=r"one kv_config\.json"):
        MixedKVCache.merge([one]).extend(MixedKVCache.merge([other]))


def test_rows_rewound_to_nothing_join_empty_ones() -> None:
    layout = _plain(recent=4)
    batch = MixedKVCache.merge([MixedKVCache(layout)])
    batch.update_and_fetch(mx.zeros((1, HEADS, 3, 32)), mx.zeros((1, HEADS, 3, 64)))
    assert batch.trim(3) == 3
    batch.extend(MixedKVCache.merge([MixedKVCache(layout)]))
    ledger = Ledger(layout, 0)
    ledger.update(batch, [Row(layout), Row(layout)], 2, [2, 2], None)
    assert batch.offset.tolist() == [2, 2]


def test_padding_that_makes_no_sense_is_refused() -> None:
    batch = BatchMixedKVCache(_plain(), [0, 0])
    with pytest.raises(UsageError, match="lengths"):
        batch.prepare(right_padding=[0, 2])
    batch.update_and_fetch(mx.zeros((2, HEADS, 3, 32)), mx.zeros((2, HEADS, 3, 64)))
    with pytest.raises(UsageError, match="empty"):
        batch.prepare(left_padding=[0, 2])
