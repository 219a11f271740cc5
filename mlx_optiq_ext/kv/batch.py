"""Many rows of different lengths in one mixed-precision KV cache, in mlx-lm's batch cache protocol.

Rows are justified to the right: the newest column is the same for all, shorter rows are padded on the left.
Made by joining :class:`~mlx_optiq_ext.kv.cache.MixedKVCache` caches; used by ``BatchGenerator``.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.kv.cache import MixedKVCache, present
from mlx_optiq_ext.kv.column_cache import ColumnCache
from mlx_optiq_ext.kv.ends import ExactEnds, RowEnds
from mlx_optiq_ext.kv.state import pack_state, same_layout, state_arrays, unpack_state
from mlx_optiq_ext.kv.store import Layout, Store, roll_columns

__all__ = ["BatchMixedKVCache"]


class BatchMixedKVCache(ColumnCache):
    """Keys and values of one layer for a batch.

    Args:
        layout: How they are stored, the same for all rows.
        left_padding: Padding columns of each row.
    """

    def __init__(self, layout: Layout, left_padding: Sequence[int]) -> None:
        super().__init__(layout)
        self.left_padding = mx.array([*left_padding], dtype=mx.int32)
        """First column of each row that is a token (B,)."""
        self.offset: mx.array = -self.left_padding
        """Tokens of each row (B,)."""
        self.seen = 0
        """Columns ever appended, those that joining put in front included."""
        self._lengths: mx.array | None = None
        """Tokens that each row will have when its right padding is over."""

    @classmethod
    def joined(cls, caches: Sequence[MixedKVCache]) -> "BatchMixedKVCache":
        """One batch of single caches that are stored alike, in this order."""
        columns = max(cache.store.used for cache in caches)
        batch = cls(caches[0].layout.joinable, [columns - cache.store.used for cache in caches])
        if not columns:
            return batch
        filled = next(cache for cache in caches if cache.store.used)
        parts = [_justified(cache, columns, filled.store.parts) for cache in caches]
        batch.store.parts = [mx.concatenate([*rows]) for rows in zip(*parts, strict=True)]
        batch.store.used = batch._shown = columns
        batch.store.dtype = filled.store.dtype
        batch.seen = max(cache.offset for cache in caches)
        batch.offset = mx.array([cache.offset for cache in caches], dtype=mx.int32)
        batch.ends.join([(cache.ends, 1) for cache in caches], batch.store)
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Add columns to every row; lazy. Arguments and result as in ``MixedKVCache``."""
        count = keys.shape[2]
        self._make_room(count)
        self._append(keys, values)
        self.seen += count
        # Whoever evaluates what is stored evaluates the bookkeeping, or its graph would grow with each token.
        self.store.parts[0] = mx.depends(self.store.parts[0], [self.left_padding, self.offset])
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the last update returned."""
        columns = self._shown
        parts = self.store.view(0, columns)
        exact = None
        if self.ends.is_kept:
            overhang = self._overhang()
            start = self.left_padding - (self.store.used - columns)
            rows = RowEnds(start, columns - overhang, self.offset - overhang)
            exact = self.ends.exact_of_rows(columns, rows)
        return present(self.store, parts, exact)

    def make_mask(
        self,
        N: int,
        return_array: bool = False,  # noqa: ARG002  mlx-lm's signature
        window_size: int | None = None,
    ) -> mx.array:
        """Mask (B, 1, N, S) for the next N queries."""
        window, used, padding = self.layout.window, self.store.used, self.left_padding
        if window is not None:
            before = min(window - 1, used)
            padding = mx.maximum(padding, 0) + self._overhang() - (used - before)
            used, window_size = before, window_size or window
        mask: mx.array = create_causal_mask(N, offset=used, window_size=window_size, left_padding=padding)
        return mask

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce padding of the tokens to come; :meth:`finalize` ends it.

        Args:
            left_padding: Padding columns in front of each row; only while empty.
            lengths: Tokens to come of each row, padding not counted.
            right_padding: Padding behind them.
        Raises:
            UsageError: Left padding for a cache that is not empty, or right padding without lengths.
        """
        if left_padding is not None:
            if self.store.parts:
                raise UsageError("left padding can be added to an empty cache only")
            padding = mx.array([*left_padding], dtype=mx.int32)
            self.left_padding, self.offset = self.left_padding + padding, self.offset - padding
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise UsageError("right padding needs the lengths of the rows as well")
            self._lengths = self.offset + mx.array([*lengths], dtype=mx.int32)
            self.ends.fill(self.store)
            self.ends.hold = max(right_padding)

    def finalize(self) -> None:
        """Move right padding to the left of its row."""
        if self._lengths is None:
            return
        self._justify()
        self._lengths = None
        self.ends.hold = 0

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; columns that only others needed go."""
        rows = mx.array(batch_indices, dtype=mx.int32)  # type: ignore[arg-type]
        if self.store.parts:
            self.store.change(lambda part: part[rows])
            self.ends.take_rows(rows)
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows]
        if self._lengths is not None:
            self._lengths = self._lengths[rows]
        surplus = min(_integers(self.left_padding), default=0)
        if surplus > 0:
            self.left_padding = self.left_padding - surplus
            if self.store.parts:
                self.store.drop(0, surplus)
                self._shown = min(self._shown, self.store.used)

    def extend(self, other: "BatchMixedKVCache") -> None:
        """Add the other batch's rows below these.

        Raises:
            UsageError: They are stored differently.
        """
        if not same_layout(self.layout, other.layout):
            raise UsageError(
                "batches of different storage cannot be joined; build them from one kv_config.json"
            )
        columns = max(self.store.used, other.store.used)
        held, added = self.store.used, other.store.used
        if columns:
            like = self.store.parts or other.store.parts
            parts = [_justified(cache, columns, like) for cache in (self, other)]
            if not self.store.parts:
                self.store.dtype = other.store.dtype
            self.store.parts = [mx.concatenate([*both]) for both in zip(*parts, strict=True)]
            self.store.used = self._shown = columns
            rows = self.offset.shape[0], other.offset.shape[0]
            joined = ExactEnds(self.layout.recent, self.layout.first)
            joined.join([(self.ends, rows[0]), (other.ends, rows[1])], self.store)
            self.ends = joined
        else:  # rows that were rewound to nothing
            self.store, self.ends = Store(self.layout), ExactEnds(self.layout.recent, self.layout.first)
        self.left_padding = mx.concatenate(
            [self.left_padding + (columns - held), other.left_padding + (columns - added)]
        )
        self.offset = mx.concatenate([self.offset, other.offset])
        self.seen = max(self.seen, other.seen)

    def extract(self, idx: int) -> MixedKVCache:
        """One row as a cache of its own; evaluates the bookkeeping."""
        cache = MixedKVCache(self.layout)
        padding = _integers(self.left_padding)[idx]
        used = self.store.used
        cache.store.dtype = self.store.dtype
        cache.offset = max(0, _integers(self.offset)[idx])
        if self.store.parts and used > padding:
            cache.store.parts = [
                mx.contiguous(part[idx : idx + 1, :, padding:used]) for part in self.store.parts
            ]
            cache.store.used = used - padding
            cache._show(1)
            cache.ends.take_row(self.ends, idx, cache.store.used)
        return cache

    def is_trimmable(self) -> bool:
        """Whether no token that a rewind would need has been dropped."""
        return self.layout.window is None or self.seen < self.layout.window

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` columns; returns how many there were."""
        n = super().trim(n)
        self.seen -= n
        return n

    def size(self) -> int:
        """Columns in reach."""
        return self.store.used if self.layout.window is None else min(self.seen, self.layout.window)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and numbers that :meth:`from_state` takes; everything mlx-lm saves and evaluates."""
        lengths = [] if self._lengths is None else [self._lengths]
        numbers = {"seen": self.seen, "lengths": len(lengths), "hold": self.ends.hold}
        return (
            pack_state(self.store, self.ends, self._shown, numbers),
            *state_arrays(self.store, self.ends),
            self.left_padding,
            self.offset,
            *lengths,
        )

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        restored = unpack_state(value[0], value[1:])
        self._take(restored)
        self.left_padding, self.offset = restored.rest[:2]
        self.seen, self.ends.hold = restored.numbers["seen"], restored.numbers["hold"]
        self._lengths = restored.rest[2] if restored.numbers["lengths"] else None

    def _make_room(self, count: int) -> None:
        """Drop columns that no query of the next ``count`` can reach, when they have piled up."""
        if self.layout.window is None or not self.store.parts:
            return
        if self._lengths is not None:
            self._justify()
        surplus = self._surplus(count)
        if surplus > 0:
            self.store.drop(0, surplus)
            self.left_padding = mx.maximum(self.left_padding - surplus, 0)

    def _overhang(self) -> mx.array:
        """Columns of right padding that each row has by now (B,)."""
        if self._lengths is None:
            return mx.zeros_like(self.offset)
        return mx.maximum(self.offset - self._lengths, 0)

    def _justify(self) -> None:
        """Move the right padding of every row to its left."""
        shifts, used = self._overhang(), self.store.used
        if self.store.parts:
            self.store.change(lambda part: roll_columns(part, shifts, used))
            self.ends.roll(shifts)
        self.left_padding = mx.maximum(self.left_padding, 0) + shifts
        self.offset = self.offset - shifts


def _integers(array: mx.array) -> list[int]:
    """Its numbers; evaluates."""
    return array.tolist()  # type: ignore[return-value]


def _justified(cache: MixedKVCache | BatchMixedKVCache, columns: int, like: list[mx.array]) -> list[mx.array]:
    """Used columns of a cache, padded on the left to ``columns``; zeros where it is empty."""
    if cache.store.parts:
        return cache.store.justified(columns)
    rows = 1 if isinstance(cache, MixedKVCache) else cache.offset.shape[0]
    return [mx.zeros((rows, part.shape[1], columns, part.shape[3]), part.dtype) for part in like]
