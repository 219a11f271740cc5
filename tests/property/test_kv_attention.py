"""Attention over stored keys and values is attention over what they unpack to, for every storage."""

import math
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_attention import HEADS, exact_attention, filled, make_mask

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.kv import attention
from mlx_optiq_ext.kv.attention import attend
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.codec import Codec, hadamard_matrix, rotation_order
from mlx_optiq_ext.kv.store import Layout
from mlx_optiq_ext.types.quant import KEEP, Choice

_DIMS = (32, 64, 80, 96, 112, 128, 192, 256, 576)
_CHOICES = (KEEP, *(Choice(bits=b, group_size=g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)))
_TOLERANCE = 2e-4
"""Of the largest value. Scores stay below 30 here; a float32 product of up to 576 numbers is right to about
1e-6 of that, softmax turns an error of a score into the same relative error of a weight, and the rotation
back adds one more product."""


def _fitting(dim: int) -> list[Choice]:
    return [choice for choice in _CHOICES if choice.fits(dim)]


_PAIRS = [(dim, choice) for dim in _DIMS for choice in _fitting(dim)]


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    dim = draw(st.sampled_from(_DIMS))
    same = draw(st.booleans())
    value_dim = dim if same else draw(st.sampled_from(_DIMS))
    length = draw(st.sampled_from([1, 3, 8, 9, 20]))
    return {
        "key": (dim, draw(st.sampled_from(_fitting(dim)))),
        "value": (value_dim, draw(st.sampled_from(_fitting(value_dim)))),
        "length": length,
        "columns": length + draw(st.integers(0, 90)),
        "mask": draw(st.sampled_from(["none", "causal", "shared", "rows", "additive"])),
        "repeats": draw(st.sampled_from([1, 2, 4])),
        "batch": draw(st.integers(1, 3)),
        "sinks": draw(st.booleans()),
        "rotate": draw(st.booleans()),
        "mean": draw(st.booleans()),
        "recent": draw(st.sampled_from([0, 0, 1, 5, 200])),
        "first": draw(st.sampled_from([0, 0, 1, 3])),
        "unpacks": draw(st.booleans()),
        "joined": draw(st.booleans()),
        "on_cpu": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def _check(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    (dim, key), (value_dim, value) = case["key"], case["value"]
    mean = mx.array(rng.standard_normal((HEADS, dim)).astype(np.float32)) if case["mean"] else None
    layout = Layout(
        Codec(key, dim, rotate=case["rotate"], mean=mean),
        Codec(value, value_dim, rotate=case["rotate"]),
        recent=case["recent"],
        first=case["first"],
        joined=case["joined"],
    )
    batch, length, columns = case["batch"], case["length"], case["columns"]
    num_queries = HEADS * case["repeats"]
    queries = rng.standard_normal((batch, num_queries, length, dim)).astype(np.float32)
    sinks = rng.standard_normal(num_queries).astype(np.float32) if case["sinks"] else None
    mask = make_mask(rng, case["mask"], batch, length, columns)
    scale = 1 / math.sqrt(dim)
    with (
        mock.patch.object(attention, "unpacks_always", return_value=case["unpacks"]),
        mock.patch.object(attention, "_on_cpu", return_value=case["on_cpu"]),
    ):
        cache, _, _ = filled(rng, layout, batch, columns)
        stored = cache.keys_and_values()
        given_ = [mx.array(queries), mx.array(mask) if isinstance(mask, np.ndarray) else mask]
        given_.append(None if sinks is None else mx.array(sinks))
        got = attend(given_[0], *stored, scale, given_[1], given_[2])
        mx.eval(got)
    expected = exact_attention(queries, *stored, scale, mask, sinks)
    assert (got.shape, got.dtype) == ((batch, num_queries, length, value_dim), mx.float32)
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max())
    for before, after in zip((queries, mask, sinks), given_, strict=True):
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(before, np.array(after))


@settings(max_examples=400, deadline=None)
@given(_cases())
def test_attention_over_stored_columns_equals_attention_over_unpacked_ones(case: dict[str, Any]) -> None:
    _check(case)


@pytest.mark.parametrize("dim", _DIMS)
def test_every_choice_works_for_keys_and_for_values_at_this_head(dim: int) -> None:
    common = {
        "mask": "causal",
        "repeats": 2,
        "batch": 2,
        "mean": True,
        "recent": 3,
        "first": 2,
        "unpacks": False,
        "joined": False,
        "on_cpu": True,
    }
    for number, choice in enumerate(_fitting(dim)):
        for length in (1, 8, 20):  # reads codes; unpacks for a few rows; unpacks for many
            case = {"length": length, "columns": 37, "sinks": number % 2 == 0, "rotate": True, "seed": number}
            _check({"key": (dim, choice), "value": (dim, choice), **case, **common})


@pytest.mark.parametrize(("dim", "choice"), [(80, "4g32"), (112, "4g32"), (96, "4g64"), (64, "4g128")])
def test_a_group_that_does_not_divide_the_head_is_refused(dim: int, choice: str) -> None:
    with pytest.raises(UsageError, match=rf"{dim} numbers.*keep"):
        Codec(Choice.parse(choice), dim)


@pytest.mark.parametrize("dim", [*_DIMS, 72, 88, 160, 7])
def test_rotations_are_orthogonal_and_exact_in_16_bits(dim: int) -> None:
    signs, order = np.array(hadamard_matrix(dim)), rotation_order(dim)
    np.testing.assert_array_equal(signs @ signs.T, order * np.eye(dim))
    assert set(np.unique(signs)) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 88, 96, 128, 576])
def test_turning_there_and_back_loses_only_the_rounding_of_the_dtype(dim: int, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(dim)
    mean = mx.array(rng.standard_normal((HEADS, dim)).astype(np.float32))
    codec = Codec(KEEP, dim, rotate=True, mean=mean)
    x = mx.array(rng.standard_normal((1, HEADS, 9, dim)).astype(np.float32)).astype(dtype)
    back = codec.restore(codec.transform(x))
    assert back.dtype == dtype
    error = np.array((back - x).astype(mx.float32))
    # Each of the four steps rounds once, relative to numbers of size about 3.
    assert np.sqrt((error**2).mean()) < 2 * 2.0 ** (-8 if dtype == mx.bfloat16 else -11)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_half_precision_models_get_their_own_dtype_and_its_accuracy(
    length: int, dtype: mx.Dtype, on_cpu: bool
) -> None:
    rng = np.random.default_rng(3)
    mean = mx.array(rng.standard_normal((HEADS, 64)).astype(np.float32))
    layout = Layout(
        Codec(Choice(bits=4, group_size=32), 64, rotate=True, mean=mean),
        Codec(Choice(bits=3, group_size=32), 64, rotate=True),
    )
    keys, values = (rng.standard_normal((1, HEADS, 40, 64)).astype(np.float32) for _ in range(2))
    queries = rng.standard_normal((1, 4, length, 64)).astype(np.float32)
    cache = MixedKVCache(layout)
    stored = cache.update_and_fetch(mx.array(keys).astype(dtype), mx.array(values).astype(dtype))
    with mock.patch.object(attention, "_on_cpu", return_value=on_cpu):
        got = attend(mx.array(queries).astype(dtype), *stored, 0.125, "causal")
    assert got.dtype == dtype
    expected = exact_attention(queries, *stored, 0.125, "causal", None)
    tolerance = 0.05 if dtype == mx.bfloat16 else 0.007  # a few roundings of numbers up to 3
    np.testing.assert_allclose(np.array(got.astype(mx.float32)), expected, rtol=0, atol=tolerance)


def test_products_beyond_float16_do_not_overflow() -> None:
    rng = np.random.default_rng(4)
    four = Codec(Choice(bits=4, group_size=32), 64)
    keys = np.full((1, HEADS, 20, 64), 50.0) + rng.standard_normal((1, HEADS, 20, 64))
    queries = np.full((1, 4, 1, 64), 50.0)  # products of 160,000: float16 ends at 65,504
    values = rng.standard_normal((1, HEADS, 20, 64))
    cache = MixedKVCache(Layout(four, four))
    stored = cache.update_and_fetch(*(mx.array(x.astype(np.float16)) for x in (keys, values)))
    with mock.patch.object(attention, "_on_cpu", return_value=False):
        got = attend(mx.array(queries.astype(np.float16)), *stored, 0.125)
    assert mx.isfinite(got).all().item()


def test_exact_ends_come_back_as_they_went_in_and_eight_bits_nearly_so() -> None:
    rng = np.random.default_rng(0)
    eight = Codec(Choice(bits=8, group_size=32), 64, rotate=True)
    cache, keys, values = filled(rng, Layout(eight, eight, recent=4, first=2), 2, 30)
    for stored, whole in zip(cache.keys_and_values(), (keys, values), strict=True):
        error = np.abs(np.array(stored.restored()) - whole).max(axis=(0, 1, 3))
        assert max(error[:2].max(), error[-4:].max()) < 1e-5
        # 255 steps over a range of at most about 10: rounding is half a step, rotated or not.
        assert 1e-4 < error[2:-4].max() < 0.06
