"""Kernels of our own do what plain operations do; they run where MLX runs on CUDA."""

import math
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from support_attention import HEADS, exact_attention, filled, make_mask

from mlx_optiq_ext.kv import cuda
from mlx_optiq_ext.kv.attention import attend
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.codec import Codec, hadamard_matrix, rotation_order
from mlx_optiq_ext.kv.rows import Rows
from mlx_optiq_ext.kv.store import Layout
from mlx_optiq_ext.kv.stored import StoredInRows
from mlx_optiq_ext.types.quant import Choice

_needs_cuda = pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX does not run on CUDA here")
_BITS = (2, 3, 4, 5, 6, 8)
_DIMS = (32, 64, 96, 128, 160, 192, 256)
_STORAGES = [
    (dim, group, number)
    for dim in _DIMS
    for group in (32, 64, 128)
    if dim % group == 0
    for number in range(len(_BITS))
]
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
_ROUNDING = {mx.float32: 2.0**-20, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


def _layout(dim: int, group: int, number: int, *, rotate: bool, centre: bool) -> Layout:
    """Keys of one width and values of another, every width for both when ``number`` runs through all."""
    mean = np.random.default_rng(dim).standard_normal((HEADS, dim)).astype(np.float32)
    key, value = (Choice(bits=_BITS[(number + shift) % 6], group_size=group) for shift in (0, 2))
    return Layout(
        Codec(key, dim, rotate=rotate, mean=mx.array(mean) if centre else None),
        Codec(value, dim, rotate=rotate),
        joined=True,
    )


@_needs_cuda
@pytest.mark.parametrize(("dim", "group", "number"), _STORAGES)
def test_kernels_store_what_plain_operations_store(dim: int, group: int, number: int) -> None:
    rng = np.random.default_rng(number)
    dtype = _DTYPES[number % 3]
    keys, values = (
        mx.array(rng.standard_normal((2, 5, HEADS, dim)).astype(np.float32)).astype(dtype).swapaxes(1, 2)
        for _ in range(2)
    )
    for rotate in (False, True):
        layout = _layout(dim, group, number, rotate=rotate, centre=number % 2 == 0)
        rows = layout.rows(dtype)
        assert rows is not None
        got, expected = (
            np.array(x) for x in (rows.encode_for_attention(keys, values)[0], rows.encode(keys, values))
        )
        if not rotate:
            np.testing.assert_array_equal(got, expected)
            continue
        for codec, mine, theirs in zip(
            (layout.key, layout.value), _numbers(rows, got), _numbers(rows, expected), strict=True
        ):
            # Sums in another order, and one rounding instead of two, move few numbers, by one code.
            most = np.abs(theirs).max()
            step, rounding = 2 * most / (2**codec.choice.bits - 1), most * _ROUNDING[dtype]
            difference = np.abs(mine - theirs)
            assert difference.max() <= 1.1 * step + 2 * rounding
            assert np.sqrt((difference**2).mean()) < 0.1 * step + rounding


def _numbers(rows: Rows, words: np.ndarray) -> list[np.ndarray]:
    parts = rows.split(mx.array(words))
    codecs = ((rows.key, parts[:3]), (rows.value, parts[3:]))
    return [np.array(codec.unpack(of, mx.float32)) for codec, of in codecs]


@_needs_cuda
@pytest.mark.parametrize(("dim", "group", "number"), _STORAGES)
def test_kernels_attend_to_what_is_stored(dim: int, group: int, number: int) -> None:
    kinds = ("none", "causal", "shared", "rows", "additive", "none")
    dtype, rotate, centre = _DTYPES[(number + dim // 32) % 3], number % 3 > 0, number % 2 == 1
    layout = _layout(dim, group, number, rotate=rotate, centre=centre)
    for length, columns, repeats in ((1, 700, 3), (1, 31, 12), (3, 450, 2), (8, 33, 4)):
        rng = np.random.default_rng(columns)
        cache, _, _ = filled(rng, layout, 2, columns, dtype)
        shape = (2, HEADS * repeats, length, dim)
        queries = np.array(mx.array(rng.standard_normal(shape)).astype(dtype).astype(mx.float32))
        mask = make_mask(rng, kinds[(number + length) % 6], 2, length, columns)
        sinks = rng.standard_normal(HEADS * repeats).astype(np.float32) if number % 2 else None
        stored, scale = cache.keys_and_values(), 1 / math.sqrt(dim)
        got = attend(
            mx.array(queries).astype(dtype),
            *stored,
            scale,
            mx.array(mask) if isinstance(mask, np.ndarray) else mask,
            None if sinks is None else mx.array(sinks),
        )
        assert (got.shape, got.dtype) == (shape, dtype)
        expected = exact_attention(queries, *map(_Widened, stored), scale, mask, sinks)
        # Only the answer is rounded to the model's type.
        np.testing.assert_allclose(
            np.array(got.astype(mx.float32)),
            expected,
            rtol=0,
            atol=2 * _ROUNDING[dtype] * np.abs(expected).max(),
        )


class _Widened:
    """A stored tensor that comes back from float64, so that the expectation rounds nothing."""

    def __init__(self, stored: StoredInRows) -> None:
        self._stored = stored

    def restored(self) -> mx.array:
        codec = self._stored.codec
        x = np.array(self._stored.numbers(mx.float32), dtype=np.float64)
        if codec.rotate:
            factor = codec.divisor / rotation_order(codec.dim)
            x = x @ np.array(hadamard_matrix(codec.dim), dtype=np.float64).T * factor
        if codec.mean is not None:
            x = x + np.array(codec.mean, dtype=np.float64)[:, None]
        return mx.array(x.astype(np.float32))


@_needs_cuda
def test_a_switch_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    four = Codec(Choice.parse("4g64"), 64)
    assert Layout(four, four).joined
    monkeypatch.setenv(cuda.SWITCH, "0")
    assert not Layout(four, four).joined


def test_rows_hold_the_parts_and_give_them_back() -> None:
    rng = np.random.default_rng(1)
    for number in range(6):
        layout = _layout(96, 32, number, rotate=False, centre=False)
        for dtype in _DTYPES:
            x = mx.array(rng.standard_normal((2, HEADS, 3, 96))).astype(dtype)
            parts = [*layout.key.pack(x), *layout.value.pack(-x)]
            rows = Rows(layout.key, layout.value, dtype)
            words = rows.join(parts)
            assert words.shape == (2, HEADS, 3, rows.width)
            assert words.nbytes == sum(part.nbytes for part in parts)
            for before, after in zip(parts, rows.split(words), strict=True):
                assert before.dtype == after.dtype
                assert mx.array_equal(before, after).item()


@_needs_cuda
def test_two_attentions_over_one_update_are_both_right() -> None:
    rng = np.random.default_rng(3)
    cache, _, _ = filled(rng, _layout(64, 64, 2, rotate=True, centre=True), 1, 700)
    new = [mx.array(rng.standard_normal((1, HEADS, 1, 64)).astype(np.float32)) for _ in range(2)]
    stored = cache.update_and_fetch(*new)
    queries = [mx.array(rng.standard_normal((1, 6, 1, 64)).astype(np.float32)) for _ in range(3)]
    got = [attend(x, *stored, 0.125) for x in queries]
    mx.eval(got)
    for x, answer in zip(queries, got, strict=True):
        expected = exact_attention(np.array(x), *map(_Widened, stored), 0.125, None, None)
        np.testing.assert_allclose(np.array(answer), expected, atol=1e-5)


@pytest.mark.parametrize("joined_before", [True, False])
def test_what_was_saved_joined_opens_apart_and_the_reverse(joined_before: bool) -> None:
    rng = np.random.default_rng(2)
    four = Codec(Choice.parse("4g32"), 64)
    cache, _, _ = filled(rng, Layout(four, four, joined=joined_before), 1, 40)
    state = cache.state
    with mock.patch("mlx_optiq_ext.kv.store.is_wanted", return_value=not joined_before):
        opened = MixedKVCache.from_state(state)
    assert opened.layout.joined is not joined_before
    for before, after in zip(cache.keys_and_values(), opened.keys_and_values(), strict=True):
        assert mx.array_equal(before.numbers(), after.numbers()).item()
    more = [mx.array(rng.standard_normal((1, HEADS, 1, 64)).astype(np.float32)) for _ in range(2)]
    assert opened.update_and_fetch(*more)[0].shape == (1, HEADS, 41, 64)
    assert opened.nbytes == cache.nbytes
