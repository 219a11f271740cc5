"""The layout of packed tensors is MLX's own."""

import mlx.core as mx
import numpy as np
import pytest
from support_codes import codes_of

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.quant.pack import join_codes, pack_plain, unpack
from mlx_optiq_ext.types.quant import AFFINE_BITS, AFFINE_GROUPS, KEEP, Choice

FLOAT_MODES = [Choice.parse(label) for label in ("mxfp4", "nvfp4", "mxfp8")]
AFFINE = [Choice(bits=bits, group_size=group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
DTYPES = [mx.bfloat16, mx.float16, mx.float32]


def random_weight(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("choice", AFFINE, ids=lambda choice: choice.label)
@pytest.mark.parametrize("shape", [(6, 256), (3, 5, 128)])
def test_join_codes_matches_mx_quantize(choice: Choice, shape: tuple[int, ...]) -> None:
    packed = pack_plain(random_weight(*shape), choice, float_dtype=mx.bfloat16)
    codes = codes_of(packed.weight, choice.bits)
    assert codes.shape == shape
    assert int(codes.max()) < 1 << choice.bits
    for form in (codes, mx.array(codes)):
        joined = join_codes(form, choice.bits)
        assert joined.dtype == mx.uint32
        assert mx.array_equal(joined, packed.weight)


@pytest.mark.parametrize("choice", AFFINE, ids=lambda choice: choice.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpack_is_code_times_scale_plus_bias(choice: Choice, dtype: mx.Dtype) -> None:
    packed = pack_plain(random_weight(4, 256), choice, float_dtype=dtype)
    assert packed.biases is not None
    codes = codes_of(packed.weight, choice.bits).astype(np.float32)
    codes = codes.reshape(4, -1, choice.group_size)
    scales, biases = (np.array(part.astype(mx.float32)) for part in (packed.scales, packed.biases))
    expected = (codes * scales[..., None] + biases[..., None]).reshape(4, 256)
    # One rounding apart where the back end fuses multiply and add.
    np.testing.assert_allclose(np.array(unpack(packed, choice)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", AFFINE + FLOAT_MODES, ids=lambda choice: choice.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_plain_is_the_stock_result(choice: Choice, dtype: mx.Dtype) -> None:
    weight = random_weight(2, 8, 256)
    packed = pack_plain(weight, choice, float_dtype=dtype)
    stock = mx.quantize(
        weight.astype(dtype), group_size=choice.group_size, bits=choice.bits, mode=choice.mode
    )
    assert mx.array_equal(packed.weight, stock[0])
    assert mx.array_equal(packed.scales, stock[1])
    assert (packed.biases is None) == (len(stock) == 2)
    if packed.biases is not None:
        assert mx.array_equal(packed.biases, stock[2])
        assert packed.scales.dtype == packed.biases.dtype == dtype


@pytest.mark.parametrize("choice", FLOAT_MODES, ids=lambda choice: choice.label)
def test_unpack_float_modes_is_float32(choice: Choice) -> None:
    weight = random_weight(4, 64)
    numbers = unpack(pack_plain(weight, choice, float_dtype=mx.bfloat16), choice)
    assert numbers.dtype == mx.float32
    assert float(mx.abs(numbers - weight).mean()) < 0.15


@pytest.mark.parametrize(("shape", "choice"), [((4, 96), Choice.parse("4g64")), ((4, 64), KEEP)])
def test_what_cannot_be_stored_is_refused(shape: tuple[int, ...], choice: Choice) -> None:
    with pytest.raises(UsageError, match=r"multiple of 64|copy the tensor"):
        pack_plain(random_weight(*shape), choice, float_dtype=mx.bfloat16)
