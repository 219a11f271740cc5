"""What a cache of one sequence and a cache of a batch have in common: columns, and their exact ends.

Knows how columns come, pile up and go, not which tokens of which row they are. Base of ``cache`` and
``batch``.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from mlx_optiq_ext.kv.ends import ExactEnds
from mlx_optiq_ext.kv.state import Restored
from mlx_optiq_ext.kv.store import Layout, Store

__all__ = ["ColumnCache"]


class ColumnCache(_BaseCache):  # type: ignore[misc]
    """Stored columns of one layer.

    Args:
        layout: How they are stored.
    """

    offset: Any
    """Tokens seen: a number, or one per row."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.store = Store(layout)
        self.ends = ExactEnds(layout.recent, layout.first)
        self._shown = 0
        """Columns that the last update returned."""

    def trim(self, n: int) -> int:
        """Forget the newest ``n`` columns; returns how many there were."""
        n = min(self.store.used, n)
        self.offset = self.offset - n
        self.store.used -= n
        self._shown = min(self._shown, self.store.used)
        self.ends.trim(n)
        return n

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return not self.store.parts

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.store.nbytes + self.ends.nbytes

    @property
    def keys(self) -> mx.array | None:
        """First buffer of the stored keys, for models that tie evaluation to it; None while empty."""
        return self.store.parts[0] if self.store.parts else None

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self.store.parts[0] = array

    def _append(self, keys: mx.array, values: mx.array) -> None:
        """Store new columns (B, H, N, ·) and show what their queries may see; lazy."""
        layout, store = self.layout, self.store
        if not store.parts:
            store.dtype = keys.dtype
        if store.rows is not None:
            words, store.counters = store.rows.encode_for_attention(keys, values)
            store.append([words])
        else:
            new_keys, new_values = layout.key.transform(keys), layout.value.transform(values)
            if self.ends.is_kept:
                self.ends.append(new_keys, new_values, self.offset)
            store.append([*layout.key.pack(new_keys), *layout.value.pack(new_values)])
        self.offset = self.offset + keys.shape[2]
        self._show(keys.shape[2])

    def _surplus(self, count: int) -> int:
        """Columns that no query of the next ``count`` tokens can reach, once they have piled up."""
        window = self.layout.window
        if window is None:
            return 0
        surplus = self.store.used - (window - 1)
        is_due = count > 1 or self.store.used + count > window + self.layout.slack
        return surplus if is_due else 0

    def _show(self, count: int) -> None:
        used, window = self.store.used, self.layout.window
        self._shown = used if window is None else min(used, window - 1 + count)

    def _take(self, restored: Restored) -> None:
        """Become what was saved."""
        self.layout = restored.store.layout
        self.store, self.ends, self._shown = restored.store, restored.ends, restored.shown
