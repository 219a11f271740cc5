"""What a cache hands to attention: keys or values as they are stored.

Stands where mlx-lm's models expect an array: has a shape and a dtype, nothing else of one. Made by
``store``; read by ``attention``.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.cuda import CudaRows

__all__ = ["Exact", "Stored", "StoredInRows"]


class Exact(NamedTuple):
    """Columns that are known in full precision besides."""

    numbers: mx.array
    """(B, H, E, D) in stored coordinates."""
    columns: mx.array
    """int32 (B or 1, E): which column of the stored tensor each one is."""
    spill: bool
    """Some entries do not exist; they name the column behind the last one."""


class Stored:
    """Keys or values (B, H, S, D) of one layer in stored form.

    Args:
        codec: How they are stored.
        parts: Arrays (B, H, S, ·): codes, scales and biases, or the numbers.
        dtype: Of the numbers that went in.
        exact: Columns to be taken from full precision instead.
    """

    __slots__ = ("_parts", "codec", "dtype", "exact")

    def __init__(
        self,
        codec: Codec,
        parts: list[mx.array],
        dtype: mx.Dtype,
        exact: Exact | None = None,
    ) -> None:
        self.codec, self._parts = codec, parts
        self.dtype, self.exact = dtype, exact

    is_optiq_stored = True
    """By this the patched attention knows what it is given, without importing anything."""

    @property
    def parts(self) -> list[mx.array]:
        """Codes, scales and biases, or the numbers: arrays (B, H, S, ·)."""
        return self._parts

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, D)."""
        batch, heads, columns = self.parts[0].shape[:3]
        return (batch, heads, columns, self.codec.dim)

    @property
    def ndim(self) -> int:
        """4."""
        return 4

    def numbers(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The tensor in stored coordinates, exact columns put in, in ``dtype`` or as it went in; lazy."""
        x = self.codec.unpack(self.parts, dtype)
        if self.exact is None or not self.codec.is_packed:
            return x
        batch, heads, columns, dim = x.shape
        count = self.exact.columns.shape[-1]
        where = mx.broadcast_to(self.exact.columns[:, None, :, None], (batch, heads, count, dim))
        if self.exact.spill:
            x = mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)])
        x = mx.put_along_axis(x, where, self.exact.numbers.astype(x.dtype), axis=2)
        return x[..., :columns, :]

    def restored(self) -> mx.array:
        """The tensor as the model computed it, up to rounding; lazy (B, H, S, D)."""
        return self.codec.restore(self.numbers())


class StoredInRows(Stored):
    """Keys or values that stand side by side with the others of their layer.

    Args:
        rows: Where they are.
        words: uint32 (B, H, S, width).
        counters: What one attention over them may count in.
        of_values: These are the values.
    """

    __slots__ = ("_counters", "_of_values", "rows", "words")

    def __init__(
        self, rows: CudaRows, words: mx.array, counters: mx.array | None = None, *, of_values: bool = False
    ) -> None:
        super().__init__(rows.value if of_values else rows.key, [], rows.dtype)
        self.rows, self.words = rows, words
        self._counters, self._of_values = counters, of_values

    def take_counters(self) -> mx.array | None:
        """The counters; None from the second time on."""
        counters, self._counters = self._counters, None
        return counters

    @property
    def parts(self) -> list[mx.array]:
        """Taken from the rows; lazy."""
        if not self._parts:
            parts = self.rows.split(self.words)
            self._parts = parts[3:] if self._of_values else parts[:3]
        return self._parts

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, D)."""
        batch, heads, columns = self.words.shape[:3]
        return (batch, heads, columns, self.codec.dim)
