"""Corrected tensors: better than plain, stored like plain, refused where the input is unusable."""

import mlx.core as mx
import numpy as np
import pytest
from support_codes import weighted_error

from mlx_optiq_ext.errors import MeasurementError, ModelError, UsageError
from mlx_optiq_ext.quant.correct import pack, pack_fast, pack_plain, unpack
from mlx_optiq_ext.types.quant import AFFINE_BITS, AFFINE_GROUPS, Choice

AFFINE = [Choice(bits=bits, group_size=group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
DTYPES = [mx.bfloat16, mx.float16, mx.float32]


def random_weight(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * 0.05


def uneven_importance(*shape: int, seed: int = 1) -> mx.array:
    """Log-normal second moments with one column far above the rest, as real inputs have."""
    moments = mx.exp(1.5 * mx.random.normal(shape, key=mx.random.key(seed)))
    return mx.concatenate([moments[..., :-1], moments[..., -1:] * 1000], axis=-1)


@pytest.mark.parametrize("choice", AFFINE, ids=lambda choice: choice.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_beats_plain_in_the_same_storage(choice: Choice, dtype: mx.Dtype) -> None:
    weight, importance = random_weight(24, 256).astype(dtype), uneven_importance(256)
    plain = pack_plain(weight, choice, float_dtype=dtype)
    fast = pack_fast(weight, choice, importance, float_dtype=dtype)
    assert fast.biases is not None
    assert plain.biases is not None
    for ours, stock in (
        (fast.weight, plain.weight),
        (fast.scales, plain.scales),
        (fast.biases, plain.biases),
    ):
        assert ours.shape == stock.shape
        assert ours.dtype == stock.dtype
    gain = weighted_error(weight, fast, choice, importance) / weighted_error(
        weight, plain, choice, importance
    )
    assert gain < 0.95


def test_experts_are_fitted_with_their_own_importance() -> None:
    choice = Choice.parse("3g32")
    weight, importance = random_weight(3, 8, 64), uneven_importance(3, 64)
    together = pack_fast(weight, choice, importance, float_dtype=mx.bfloat16)
    for expert in range(3):
        alone = pack_fast(weight[expert], choice, importance[expert], float_dtype=mx.bfloat16)
        assert mx.array_equal(together.weight[expert], alone.weight)
        assert mx.array_equal(together.scales[expert], alone.scales)


def test_chunking_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, weight, importance = Choice.parse("4g64"), random_weight(3, 40, 128), uneven_importance(128)
    whole = pack_fast(weight, choice, importance, float_dtype=mx.bfloat16)
    monkeypatch.setattr("mlx_optiq_ext.quant.fast._CPU_CHUNK", 7 * 128)
    chunked = pack_fast(weight, choice, importance, float_dtype=mx.bfloat16)
    assert mx.array_equal(whole.weight, chunked.weight)
    assert mx.array_equal(whole.scales, chunked.scales)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_groups_are_stored_exactly(bits: int, value: float) -> None:
    choice, weight = Choice(bits=bits, group_size=32), mx.full((2, 64), value)
    packed = pack_fast(weight, choice, uneven_importance(64), float_dtype=mx.bfloat16)
    assert np.array_equal(np.array(unpack(packed, choice)), np.array(weight))


def test_huge_outliers_stay_finite_and_no_worse_than_plain() -> None:
    choice, importance = Choice.parse("4g64"), uneven_importance(128)
    weight = random_weight(8, 128)
    weight[3, 70] = 3.0e4
    weight[5, 2] = -1.0e30
    plain = pack_plain(weight, choice, float_dtype=mx.bfloat16)
    fast = pack_fast(weight, choice, importance, float_dtype=mx.bfloat16)
    for rows in (slice(0, 5), slice(6, 8)):
        errors = [((unpack(p, choice) - weight)[rows].square() * importance).sum() for p in (fast, plain)]
        assert float(errors[0]) <= float(errors[1])
    assert bool(mx.isfinite(unpack(fast, choice)).all())


def test_inputs_that_are_always_zero_leave_sensible_weights() -> None:
    choice, weight = Choice.parse("4g32"), random_weight(4, 64)
    packed = pack_fast(weight, choice, mx.zeros((64,)), float_dtype=mx.bfloat16)
    assert float(mx.abs(unpack(packed, choice) - weight).max()) < 0.03


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("label", ["4g64", "mxfp4"])
def test_non_finite_weights_are_refused(poison: float, label: str) -> None:
    weight = random_weight(4, 64)
    weight[1, 2] = poison
    with pytest.raises(ModelError, match="holds 1 non-finite"):
        pack_fast(weight, Choice.parse(label), mx.ones((64,)), float_dtype=mx.bfloat16)


@pytest.mark.parametrize("importance", [mx.ones((32,)), mx.full((64,), -1.0), mx.full((64,), float("nan"))])
def test_unusable_importance_is_refused(importance: mx.array) -> None:
    with pytest.raises(MeasurementError, match="importance"):
        pack_fast(random_weight(4, 64), Choice.parse("4g64"), importance, float_dtype=mx.bfloat16)


def test_pack_none_is_plain_and_fast_needs_importance() -> None:
    choice, weight = Choice.parse("4g64"), random_weight(4, 64)
    plain = pack(weight, choice, level="none", float_dtype=mx.bfloat16)
    assert mx.array_equal(plain.weight, pack_plain(weight, choice, float_dtype=mx.bfloat16).weight)
    with pytest.raises(UsageError, match="second moments"):
        pack(weight, choice, level="fast", float_dtype=mx.bfloat16)
