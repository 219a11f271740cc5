"""Float modes: bit patterns are MLX's own, and fitted scales never lose to plain ones."""

import mlx.core as mx
import numpy as np
import pytest
from support_codes import codes_of, weighted_error

from mlx_optiq_ext.quant.correct import pack_fast, pack_plain, unpack
from mlx_optiq_ext.quant.float_fit import decode_float_codes, decode_float_scales, fit_float_groups
from mlx_optiq_ext.types.quant import Choice

MODES = ["mxfp4", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("mode", MODES)
def test_codes_and_scales_decode_as_mlx_does(mode: str) -> None:
    choice = Choice.parse(mode)
    weight = mx.random.normal((16, 256), key=mx.random.key(0))
    packed = pack_plain(weight, choice, float_dtype=mx.bfloat16)
    codes = codes_of(packed.weight, choice.bits).astype(np.float32)
    scales = decode_float_scales(np.array(packed.scales, dtype=np.float32), choice.mode, np)
    values = decode_float_codes(codes, choice.mode, np).reshape(16, -1, choice.group_size) * scales[..., None]
    np.testing.assert_array_equal(values.reshape(16, 256), np.array(unpack(packed, choice)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])
def test_representable_numbers_are_encoded_exactly(mode: str, xp: object) -> None:
    choice = Choice.parse(mode)
    every_code = np.arange(1 << choice.bits, dtype=np.float32)
    every_code = every_code[(every_code % 128 != 127) | (mode != "mxfp8")]  # e4m3's NaN
    groups = np.resize(every_code, (1, 16, choice.group_size))
    numbers = decode_float_codes(groups, choice.mode, np)
    one = 127 if mode != "nvfp4" else 0x38
    start = xp.full((1, 16), float(one), dtype=xp.float32)  # type: ignore[attr-defined]
    ones = xp.ones((1, 1, 1), dtype=xp.float32)  # type: ignore[attr-defined]
    fitted = fit_float_groups(xp.array(numbers), ones, start, choice.mode, xp)  # type: ignore[attr-defined]
    back = decode_float_codes(np.array(fitted.codes), choice.mode, np)
    scale = decode_float_scales(np.array(fitted.scale), choice.mode, np)
    np.testing.assert_array_equal(back * scale[..., None], numbers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(16, 256), (2, 8, 128)])
def test_fast_is_never_worse_than_plain(mode: str, shape: tuple[int, ...]) -> None:
    choice = Choice.parse(mode)
    weight = mx.random.normal(shape, key=mx.random.key(1)) ** 3
    importance = mx.exp(2 * mx.random.normal((shape[-1],), key=mx.random.key(2)))
    plain = pack_plain(weight, choice, float_dtype=mx.bfloat16)
    fast = pack_fast(weight, choice, importance, float_dtype=mx.bfloat16)
    assert fast.biases is None
    assert (fast.weight.shape, fast.scales.dtype) == (plain.weight.shape, mx.uint8)
    gain = weighted_error(weight, fast, choice, importance) / weighted_error(
        weight, plain, choice, importance
    )
    assert gain <= 1.0
    assert gain < 0.98 or mode == "mxfp8"


@pytest.mark.parametrize("mode", MODES)
def test_zero_groups_stay_zero(mode: str) -> None:
    weight = mx.zeros((2, 64))
    packed = pack_fast(weight, Choice.parse(mode), mx.ones((64,)), float_dtype=mx.bfloat16)
    assert float(mx.abs(unpack(packed, Choice.parse(mode))).max()) == 0.0
