"""What a KV cache must show, told by a list of tokens per row.

Every row is a list of token numbers; the ledger knows each token's keys and values in stored coordinates, in
full precision and packed alone. Nothing here pads, slides, joins or shifts columns.
"""

from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.kv.batch import BatchMixedKVCache
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.store import Layout

__all__ = ["HEADS", "Ledger", "Row", "again"]

HEADS = 2


class Row:
    """Tokens of one sequence, and which of them are still known in full precision."""

    def __init__(
        self, layout: Layout, tokens: list[int] | None = None, exact: list[bool] | None = None
    ) -> None:
        self.layout = layout
        self.tokens, self.exact = tokens or [], exact or []

    def copy(self) -> "Row":
        """The same tokens, to go on separately."""
        return Row(self.layout, list(self.tokens), list(self.exact))

    def append(self, tokens: list[int]) -> None:
        """Add tokens; older ones leave the recent window."""
        self.tokens += tokens
        self.exact += [True] * len(tokens)
        total = len(self.tokens)
        for i in range(total):
            inside = i >= total - self.layout.recent or i < self.layout.first
            self.exact[i] = self.exact[i] and inside

    def trim(self, count: int) -> None:
        """Forget the newest tokens."""
        keep = len(self.tokens) - count
        self.tokens, self.exact = self.tokens[:keep], self.exact[:keep]

    def seen_by(self, last: int, new: list[int], reach: int | None) -> list[int]:
        """Positions that the ``last``-th of the new tokens sees, ``new`` being in the row already."""
        before = list(range(len(self.tokens) - len(new)))
        window, kept = self.layout.window, self.layout.first_kept
        if window is not None and len(before) > window - 1:
            before = before[:kept] + before[len(before) - (window - 1 - kept) :]
        after = range(len(self.tokens) - len(new), len(self.tokens))
        columns = [*before, *after][: len(before) + last + 1]
        limit = reach or window
        return columns if limit is None else columns[-limit:]


class Ledger:
    """Numbers of every token ever made, and updates of caches with fresh ones."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout, self.rng = layout, np.random.default_rng(seed)
        self.exact: list[tuple[np.ndarray, np.ndarray]] = []
        self.packed: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, cache: Any, rows: list[Row], count: int, real: list[int], reach: int | None) -> None:
        """Give every row ``real`` tokens and padding behind them up to ``count``; check what each sees."""
        self.update_columns(cache, rows, [(0, n) for n in real], count, reach)

    def update_columns(
        self, cache: Any, rows: list[Row], spans: list[tuple[int, int]], count: int, reach: int | None
    ) -> None:
        """The same where row r's tokens are columns ``spans[r]`` of the block."""
        codecs = (self.layout.key, self.layout.value)
        shape = (len(rows), HEADS, count)
        given = [
            mx.array(self.rng.standard_normal((*shape, codec.dim)).astype(np.float32)) for codec in codecs
        ]
        mask = cache.make_mask(count, return_array=False, window_size=reach)
        got = cache.update_and_fetch(*given)
        stored = [codec.transform(x) for codec, x in zip(codecs, given, strict=True)]
        added = []
        for r, row in enumerate(rows):
            new = [self._note([x[r : r + 1, :, i : i + 1] for x in stored]) for i in range(*spans[r])]
            row.append(new)
            added.append(new)
        shown = [x if self.layout.dense else x.numbers() for x in got]
        self._check(shown, mask, rows, spans, added, reach)

    def _note(self, token: list[mx.array]) -> int:
        """Number of a token whose keys and values are packed alone."""
        codecs = (self.layout.key, self.layout.value)
        packed = [codec.unpack(codec.pack(x)) for codec, x in zip(codecs, token, strict=True)]
        self.exact.append((np.array(token[0])[0, :, 0], np.array(token[1])[0, :, 0]))
        self.packed.append((np.array(packed[0])[0, :, 0], np.array(packed[1])[0, :, 0]))
        return len(self.exact) - 1

    def numbers(self, row: Row, positions: list[int], tensor: int) -> np.ndarray:
        """(H, len(positions), D) in stored coordinates."""
        tables = (self.packed, self.exact)
        return np.stack([tables[row.exact[i]][row.tokens[i]][tensor] for i in positions], axis=1)

    def _check(
        self,
        shown: list[mx.array],
        mask: Any,
        rows: list[Row],
        spans: list[tuple[int, int]],
        added: list[list[int]],
        reach: int | None,
    ) -> None:
        arrays, codecs = [np.array(x) for x in shown], (self.layout.key, self.layout.value)
        count = max(end for _, end in spans)
        for r, row in enumerate(rows):
            first = spans[r][0]
            for n in range(len(added[r])):
                columns = _visible(mask, r, first + n, arrays[0].shape[2], count)
                positions = row.seen_by(n, added[r], reach)
                assert len(columns) == len(positions), (r, n, columns, positions)
                for tensor, (codec, array) in enumerate(zip(codecs, arrays, strict=True)):
                    expected = self.numbers(row, positions, tensor)
                    if self.layout.dense:
                        restored = np.array(codec.restore(mx.array(expected[None])))[0]
                        np.testing.assert_allclose(array[r][:, columns], restored, atol=1e-5)
                    else:
                        np.testing.assert_array_equal(array[r][:, columns], expected)


def _visible(mask: Any, row: int, query: int, columns: int, count: int) -> list[int]:
    """Columns that a query of a row may see."""
    if mask is None:
        return list(range(columns))
    if isinstance(mask, str):
        return list(range(columns - count + query + 1))
    whole = np.array(mask.reshape(*[1] * (4 - mask.ndim), *mask.shape))
    assert whole.shape[-1] == columns, (whole.shape, columns)
    seen = whole[row % whole.shape[0], 0, query % whole.shape[2]]
    return [int(i) for i in np.flatnonzero(seen)]


def again(cache: MixedKVCache | BatchMixedKVCache) -> Any:
    """The cache as its saved state makes it, on a machine that joins keys and values as this one did."""
    state = [array + 0 if isinstance(array, mx.array) else array for array in cache.state]
    with mock.patch("mlx_optiq_ext.kv.store.is_wanted", return_value=cache.layout.joined):
        return type(cache).from_state(state)
