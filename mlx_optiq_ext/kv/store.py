"""The columns of one layer: keys and values packed as they arrive, in buffers that grow.

Knows how columns are written, dropped, shifted and joined, not which tokens they are: ``cache`` and
``batch`` do. Every operation applies to keys and values alike.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.cuda import CudaRows, is_wanted
from mlx_optiq_ext.kv.rows import Rows
from mlx_optiq_ext.types.kv import sliding_slack

__all__ = ["GROWTH", "Layout", "Store", "roll_columns"]

GROWTH = 256
"""Columns by which a buffer grows."""


class Layout:
    """How one layer's cache is stored.

    Args:
        key, value: Storage of keys and of values.
        window: Tokens that attention reaches back to, itself included; None: all.
        first_kept: Leading columns that sliding never drops.
        recent, first: Last and first tokens that are kept in full precision besides.
        dense: Hand restored arrays to the model instead of stored ones (models that compute on them).
        joined: Store a token's keys and values side by side (:class:`~mlx_optiq_ext.kv.rows.Rows`) where that
            is possible; None: where kernels read them so.
    """

    def __init__(
        self,
        key: Codec,
        value: Codec,
        *,
        window: int | None = None,
        first_kept: int = 0,
        recent: int = 0,
        first: int = 0,
        dense: bool = False,
        joined: bool | None = None,
    ) -> None:
        self.key, self.value = key, value
        self.window, self.first_kept = window, first_kept
        packed = key.is_packed or value.is_packed
        if window is not None:  # what is kept exactly must stay in reach, and a first token slides out
            recent, first = min(recent, window - first_kept), 0
        self.recent, self.first = (recent, first) if packed else (0, 0)
        self.dense = dense
        wanted = is_wanted() if joined is None else joined
        unjoinable = dense or self.recent or self.first or not Rows.can_hold(key, value)
        self.joined = wanted and not unjoinable
        self._rows: dict[mx.Dtype, CudaRows] = {}

    def __deepcopy__(self, _: dict[int, object]) -> "Layout":
        """Layouts never change: copies of a cache share theirs."""
        return self

    @functools.cached_property
    def joinable(self) -> "Layout":
        """The same for rows of a batch, where leading tokens slide out like all others (as in mlx-lm)."""
        if not self.first_kept:
            return self
        return Layout(
            self.key,
            self.value,
            window=self.window,
            recent=self.recent,
            first=self.first,
            dense=self.dense,
            joined=self.joined,
        )

    def rows(self, dtype: mx.Dtype) -> CudaRows | None:
        """Where everything is in a row of a token's numbers of this type; None: not joined."""
        if not self.joined:
            return None
        if dtype not in self._rows:
            self._rows[dtype] = CudaRows(self.key, self.value, dtype)
        return self._rows[dtype]

    @property
    def slack(self) -> int:
        """Columns that a sliding cache holds beyond its window before it drops any."""
        return 0 if self.window is None else sliding_slack(self.window)


class Store:
    """Packed keys and values in columns, column 0 the oldest.

    ``rows`` says where everything is in the rows of :attr:`parts`; None: keys and values are stored apart.

    Args:
        layout: How they are stored.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.parts: list[mx.array] = []
        """Arrays (B, H, capacity, ·): key parts, then value parts, or rows; empty before the first append."""
        self.used = 0
        self.dtype = mx.float32
        self.counters: mx.array | None = None
        """What the next attention over the newest columns may count in, once; of joined rows on CUDA."""

    def __deepcopy__(self, memo: dict[int, object]) -> "Store":
        """The same columns in arrays of their own."""
        copied = Store(self.layout)
        copied.parts = copy.deepcopy(self.parts, memo)
        copied.used, copied.dtype = self.used, self.dtype
        return copied

    @property
    def dtype(self) -> mx.Dtype:
        """Of the numbers that are stored."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: mx.Dtype) -> None:
        self._dtype, self.rows = dtype, self.layout.rows(dtype)

    @property
    def capacity(self) -> int:
        """Columns that the buffers hold."""
        return int(self.parts[0].shape[2]) if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(part.nbytes for part in self.parts)

    def append(self, new: Sequence[mx.array]) -> None:
        """Add columns, as :attr:`parts` are: (B, H, N, ·)."""
        start, end = self.used, self.used + new[0].shape[2]
        if end > self.capacity:
            self._grow(new, end)
        for part, columns in zip(self.parts, new, strict=True):
            part[..., start:end, :] = columns
        self.used = end

    def view(self, first: int, columns: int) -> list[mx.array]:
        """Parts of the first ``first`` and the last ``columns - first`` columns used."""
        start = self.used - (columns - first)
        if start <= first:
            first, start = 0, self.used - columns
        if first:
            return [
                mx.concatenate([part[..., :first, :], part[..., start : self.used, :]], axis=2)
                for part in self.parts
            ]
        if start or self.used < self.capacity:
            return [part[..., start : self.used, :] for part in self.parts]
        return self.parts

    def apart(self, parts: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        """Such parts of keys and of values; lazy."""
        if self.rows is not None:
            parts = self.rows.split(parts[0])
        num_keys = self.layout.key.num_parts
        return parts[:num_keys], parts[num_keys:]

    def drop(self, start: int, count: int) -> None:
        """Remove columns; later ones move up."""
        if count <= 0:
            return
        self.change(
            lambda part: mx.concatenate(
                [part[..., :start, :], part[..., start + count : self.used, :]], axis=2
            )
        )
        self.used -= count

    def change(self, change: Callable[[mx.array], mx.array]) -> None:
        """Replace every buffer by what ``change`` makes of it."""
        self.parts = [change(part) for part in self.parts]

    def justified(self, columns: int) -> list[mx.array]:
        """Used columns, padded with zeros on the left to ``columns``."""
        left = columns - self.used
        used = [part[..., : self.used, :] for part in self.parts]
        return [mx.pad(part, [(0, 0), (0, 0), (left, 0), (0, 0)]) for part in used] if left else used

    def _grow(self, like: Sequence[mx.array], needed: int) -> None:
        """Make room for ``needed`` columns; a sliding store grows no further than it has to."""
        window = self.layout.window
        capacity = -(-needed // GROWTH) * GROWTH
        if window is not None:
            capacity = max(needed, min(capacity, window + self.layout.slack))
        room = [mx.zeros((*new.shape[:2], capacity - self.used, new.shape[3]), new.dtype) for new in like]
        if self.used:
            held = [part[..., : self.used, :] for part in self.parts]
            room = [mx.concatenate([old, new], axis=2) for old, new in zip(held, room, strict=True)]
        self.parts = room


def roll_columns(part: mx.array, shifts: mx.array, used: int) -> mx.array:
    """Move the used columns of every row to the right, those that fall off coming back on the left.

    Args:
        part: (B, H, capacity, ·).
        shifts: int (B,), ≥ 0.
        used: Columns in use; the buffer behind them is cut off.
    """
    part = part[..., :used, :]
    source = (mx.arange(used)[None] - shifts[:, None]) % used
    where = mx.broadcast_to(source[:, None, :, None], part.shape)
    rolled: mx.array = mx.take_along_axis(part, where, axis=2)
    return rolled
