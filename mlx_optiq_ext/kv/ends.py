"""The first and the last tokens of a cache in full precision, besides their packed form.

The packed columns stay complete, so trimming, joining and sliding need nothing of this; attention only takes
these columns from here. Belongs to one cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_optiq_ext.kv.store import Store, roll_columns
from mlx_optiq_ext.kv.stored import Exact

__all__ = ["ExactEnds", "RowEnds"]


class RowEnds(NamedTuple):
    """Where the tokens of every row are in a view, (B,) each."""

    start: mx.array
    """Column of the first token; below zero where it is out of view."""
    end: mx.array
    """Column behind the last token."""
    length: mx.array
    """Tokens of the row, those out of view included."""


class ExactEnds:
    """Keys and values of some tokens, in stored coordinates.

    Args:
        recent: Last tokens to keep.
        first: First tokens to keep.
    """

    def __init__(self, recent: int, first: int) -> None:
        self.recent, self.first = recent, first
        self.hold = 0
        """Further tokens kept on the left while rows wait to be shifted right."""
        self.last_arrays: list[mx.array] = []
        """Keys and values (B, H, ≤ recent + hold, ·), the last column the newest."""
        self.first_arrays: list[mx.array] = []
        """Keys and values (B, H, first, ·) by position in the row."""

    @property
    def is_kept(self) -> bool:
        """Whether anything is kept at all."""
        return bool(self.recent or self.first)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in (*self.last_arrays, *self.first_arrays))

    def append(self, keys: mx.array, values: mx.array, position: int | mx.array) -> None:
        """Note new columns (B, H, N, ·); ``position`` is the row position of their first, int or (B,)."""
        new = [keys, values]
        if self.recent:
            limit = self.recent + self.hold
            held = self.last_arrays or [array[..., :0, :] for array in new]
            self.last_arrays = [
                mx.contiguous(mx.concatenate([old, fresh], axis=2)[..., -limit:, :])
                for old, fresh in zip(held, new, strict=True)
            ]
        if self.first and not (isinstance(position, int) and position >= self.first):
            self._note_first(new, mx.array(position).reshape(-1))

    def _note_first(self, new: list[mx.array], position: mx.array) -> None:
        """Put those of the new columns that are among the first into their places."""
        batch, heads, count = new[0].shape[:3]
        source = mx.arange(self.first)[None] - position[:, None]
        inside = mx.logical_and(source >= 0, source < count)
        where = mx.clip(source, 0, count - 1)[:, None, :, None]
        held = self.first_arrays or [
            mx.zeros((batch, heads, self.first, array.shape[3]), array.dtype) for array in new
        ]
        taken = [
            mx.take_along_axis(array, mx.broadcast_to(where, (batch, heads, self.first, array.shape[3])), 2)
            for array in new
        ]
        self.first_arrays = [
            mx.where(inside[:, None, :, None], fresh, old) for fresh, old in zip(taken, held, strict=True)
        ]

    def trim(self, count: int) -> None:
        """Forget the newest ``count`` columns; older ones stay packed only."""
        if count and self.last_arrays:
            kept = max(0, self.last_arrays[0].shape[2] - count)
            self.last_arrays = [array[..., :kept, :] for array in self.last_arrays]

    def fill(self, store: Store) -> None:
        """Take last tokens that :meth:`trim` forgot from the packed columns, so that rows can be shifted."""
        count = min(self.recent, store.used)
        held = self.last_arrays[0].shape[2] if self.last_arrays else 0
        if held >= count:
            return
        older = [array[..., : count - held, :] for array in self._packed_last(store, count)]
        self.last_arrays = (
            [mx.concatenate([old, array], axis=2) for old, array in zip(older, self.last_arrays, strict=True)]
            if self.last_arrays
            else older
        )

    @staticmethod
    def _packed_last(store: Store, count: int) -> list[mx.array]:
        """The last columns of keys and of values, unpacked."""
        keys, values = store.apart(store.view(0, count))
        unpacked = [store.layout.key.unpack(keys), store.layout.value.unpack(values)]
        return [array[..., :count, :] for array in unpacked]

    def roll(self, shifts: mx.array) -> None:
        """Follow rows that were shifted right by (B,) columns."""
        if self.last_arrays and self.last_arrays[0].shape[2]:
            used = self.last_arrays[0].shape[2]
            self.last_arrays = [roll_columns(array, shifts, used) for array in self.last_arrays]

    def take_rows(self, rows: mx.array) -> None:
        """Keep some rows."""
        self.last_arrays = [array[rows] for array in self.last_arrays]
        self.first_arrays = [array[rows] for array in self.first_arrays]

    def take_row(self, other: "ExactEnds", row: int, used: int) -> None:
        """Become one row of another, of which ``used`` columns are tokens."""
        self.last_arrays = [
            mx.contiguous(array[row : row + 1, :, max(0, array.shape[2] - min(used, self.recent)) :])
            for array in other.last_arrays
        ]
        self.first_arrays = [array[row : row + 1] for array in other.first_arrays]

    def join(self, pieces: Sequence[tuple["ExactEnds", int]], store: Store) -> None:
        """Become the rows of several, one below the other.

        Args:
            pieces: Each with the rows it holds.
            store: All rows joined; tokens that a piece no longer has exactly are taken from there.
        """
        joined = store.parts[0].shape[0]
        count = min(self.recent, store.used)
        last = self._packed_last(store, count) if count else []
        first = [
            mx.zeros((joined, array.shape[1], self.first, array.shape[3]), array.dtype)
            for array in next((ends.first_arrays for ends, _ in pieces if ends.first_arrays), [])
        ]
        row = 0
        for ends, rows in pieces:
            held = min(count, ends.last_arrays[0].shape[2]) if ends.last_arrays else 0
            for whole, piece in zip(last, ends.last_arrays, strict=False):
                if held:
                    whole[row : row + rows, :, count - held : count] = piece[..., -held:, :]
            for whole, piece in zip(first, ends.first_arrays, strict=False):
                whole[row : row + rows] = piece
            row += rows
        self.last_arrays, self.first_arrays = last, first

    def exact(self, columns: int, offset: int) -> tuple[Exact, Exact] | None:
        """Exact keys and values of a view of ``columns`` columns, no row padded."""
        first = min(self.first, offset) if self.first_arrays else 0
        last = self.last_arrays[0].shape[2] if self.last_arrays else 0
        last = max(0, min(last, self.recent, columns - first))
        if not first + last:
            return None
        where = mx.array([*range(first), *range(columns - last, columns)], dtype=mx.int32)[None]
        return self._exact(where, False, first, last)

    def exact_of_rows(self, columns: int, rows: "RowEnds") -> tuple[Exact, Exact] | None:
        """The same where every row has a start and an end of its own in the view."""
        first = self.first if self.first_arrays else 0
        last = min(self.last_arrays[0].shape[2], columns) if self.last_arrays else 0
        if not first + last:
            return None
        starts, ends = rows.start[:, None], rows.end[:, None]
        at_first = mx.broadcast_to(mx.arange(first)[None], (starts.shape[0], first))
        at_last = mx.broadcast_to(mx.arange(columns - last, columns)[None], (starts.shape[0], last))
        recent = mx.logical_and(at_last >= starts + first, at_last >= ends - self.recent)
        valid = mx.concatenate(
            [at_first < rows.length[:, None], mx.logical_and(recent, at_last < ends)], axis=1
        )
        where = mx.where(valid, mx.concatenate([starts + at_first, at_last], axis=1), columns)
        return self._exact(where.astype(mx.int32), True, first, last)

    def _exact(self, where: mx.array, spill: bool, first: int, last: int) -> tuple[Exact, Exact]:
        found: list[Exact] = []
        for tensor in range(2):
            arrays = [self.first_arrays[tensor][..., :first, :]] if first else []
            if last:
                arrays.append(self.last_arrays[tensor][..., -last:, :])
            numbers = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=2)
            found.append(Exact(numbers, where, spill))
        return found[0], found[1]
