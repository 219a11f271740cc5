"""A KV cache in mixed precision, growing or sliding, in mlx-lm's cache protocol.

Knows one sequence (or several of equal length without padding); ``batch`` holds rows of different lengths.
Made by ``build``; used by mlx-lm's models and generators.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import create_attention_mask

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.kv.column_cache import ColumnCache
from mlx_optiq_ext.kv.state import pack_state, same_layout, state_arrays, unpack_state
from mlx_optiq_ext.kv.store import Layout, Store
from mlx_optiq_ext.kv.stored import Exact, Stored, StoredInRows

if TYPE_CHECKING:
    from mlx_optiq_ext.kv.batch import BatchMixedKVCache

__all__ = ["MixedKVCache", "sliding_mask"]


class MixedKVCache(ColumnCache):
    """Keys and values of one layer, each in its own precision, quantized as they arrive.

    Args:
        layout: How they are stored.

    ``update_and_fetch`` returns :class:`~mlx_optiq_ext.kv.stored.Stored` pairs, which need the patched
    attention, or plain arrays where ``layout.dense`` is set.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.offset: int = 0
        """Tokens seen."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Add tokens; lazy.

        Args:
            keys: (B, H, N, D).
            values: (B, H, N, Dv).
        Returns:
            Keys and values that the N queries may see, oldest first.
        """
        self.store.drop(self.layout.first_kept, self._surplus(keys.shape[2]))
        self._append(keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the last update returned."""
        columns = self._shown
        parts = self.store.view(self.layout.first_kept, columns)
        exact = self.ends.exact(columns, self.offset) if self.ends.is_kept else None
        return present(self.store, parts, exact)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Mask for the next N queries: None, "causal", or bool (N, S)."""
        window = self.layout.window
        if window is None:
            mask: mx.array | str | None = create_attention_mask(N, self.offset, return_array, window_size)
            return mask
        return sliding_mask(N, self.offset, window, window_size, return_array)

    def is_trimmable(self) -> bool:
        """Whether no token that a rewind would need has been dropped."""
        return self.layout.window is None or self.offset < self.layout.window

    def size(self) -> int:
        """Tokens in reach."""
        return self.offset if self.layout.window is None else min(self.offset, self.layout.window)

    @property
    def state(self) -> tuple[Any, ...]:
        """Arrays and numbers that :meth:`from_state` takes; everything mlx-lm saves and evaluates."""
        numbers = {"offset": self.offset}
        return (
            pack_state(self.store, self.ends, self._shown, numbers),
            *state_arrays(self.store, self.ends),
        )

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        restored = unpack_state(value[0], value[1:])
        self._take(restored)
        self.offset = restored.numbers["offset"]

    @classmethod
    def merge(cls, caches: Sequence["MixedKVCache"]) -> "BatchMixedKVCache":
        """Join caches of one layer, of any lengths, into one batch.

        Raises:
            UsageError: They are stored differently.
        """
        from mlx_optiq_ext.kv.batch import BatchMixedKVCache  # deferred: it makes these when rows leave

        layouts = [cache.layout.joinable for cache in caches]
        if not all(same_layout(layouts[0], layout) for layout in layouts[1:]):
            raise UsageError(
                "caches of different storage cannot share a batch; build all of them from one kv_config.json"
            )
        return BatchMixedKVCache.joined(caches)


def present(
    store: Store,
    parts: list[mx.array],
    exact: tuple[Exact, Exact] | None,
) -> tuple[Any, Any]:
    """Keys and values as the model gets them: stored, or restored where it computes on them itself."""
    layout = store.layout
    if store.rows is not None:
        words = parts[0]
        counters, store.counters = store.counters, None
        return StoredInRows(store.rows, words, counters), StoredInRows(store.rows, words, of_values=True)
    keys, values = store.apart(parts)
    exact_keys, exact_values = exact or (None, None)
    stored = (
        Stored(layout.key, keys, store.dtype, exact_keys),
        Stored(layout.value, values, store.dtype, exact_values),
    )
    if not layout.dense:
        return stored
    return stored[0].restored().astype(store.dtype), stored[1].restored().astype(store.dtype)


def sliding_mask(
    N: int, offset: int, window: int, window_size: int | None, return_array: bool
) -> mx.array | str | None:
    """Mask over the columns that a sliding cache shows, oldest first.

    Args:
        N: Queries to come.
        offset: Tokens seen.
        window: Tokens the cache reaches back to.
        window_size: Tokens that the model's attention reaches back to; None: the same.
        return_array: Never answer "causal".
    """
    reach = window_size or window
    before = min(window - 1, offset)
    if N > 1:
        if before + N > reach or return_array:
            mask: mx.array = create_causal_mask(N, before, window_size=reach)
            return mask
        return "causal"
    if before + 1 <= reach:
        return None
    return mx.arange(before + 1) >= before + 1 - reach
