"""For any weight and any importance, fast is never worse than plain and full never worse than fast."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support_codes import codes_of, weighted_error

from mlx_optiq_ext.quant.correct import pack_fast, pack_full, pack_plain, unpack
from mlx_optiq_ext.quant.pack import join_codes
from mlx_optiq_ext.types.quant import AFFINE_BITS, AFFINE_GROUPS, Choice

choices = st.builds(
    lambda bits, group: Choice(bits=bits, group_size=group),
    st.sampled_from(AFFINE_BITS),
    st.sampled_from(AFFINE_GROUPS),
)
dtypes = st.sampled_from([mx.bfloat16, mx.float16, mx.float32])


def drawn_weight(data: st.DataObject, width: int, dtype: mx.Dtype) -> mx.array:
    """Rows of random scale, offset and tail, some constant, zeros sprinkled in; exact in ``dtype``."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((4, width)) ** data.draw(st.sampled_from([1, 3]))
    rows *= 10.0 ** rng.uniform(-3, 2, (4, 1))
    rows += data.draw(st.sampled_from([0.0, 0.0, 1.0])) * rng.standard_normal((4, 1))
    rows[rng.random(rows.shape) < data.draw(st.sampled_from([0.0, 0.3, 0.95]))] = 0
    if data.draw(st.booleans()):
        rows[0] = rows[0, 0]
    return mx.array(rows.astype(np.float32)).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), choice=choices, dtype=dtypes)
def test_fast_is_never_worse_than_plain(data: st.DataObject, choice: Choice, dtype: mx.Dtype) -> None:
    weight = drawn_weight(data, 128, dtype)
    spread = data.draw(st.sampled_from([0.0, 1.0, 4.0]))
    importance = mx.exp(spread * mx.random.normal((128,), key=mx.random.key(3)))
    plain = pack_plain(weight, choice, float_dtype=dtype)
    fast = pack_fast(weight, choice, importance, float_dtype=dtype)
    for row in range(4):
        ours, theirs = (
            weighted_error(weight[row : row + 1], one_row(packed, row), choice, importance)
            for packed in (fast, plain)
        )
        # Positions on the code grid carry float32 rounding of the weight's magnitude.
        floor = 1e-10 * float((weight[row].astype(mx.float32).square() * importance).sum())
        assert ours <= theirs * (1 + 1e-4) + floor


@settings(max_examples=30, deadline=None)
@given(data=st.data(), choice=choices, dtype=dtypes, tokens=st.sampled_from([1, 30, 500]))
def test_full_is_never_worse_than_fast(
    data: st.DataObject, choice: Choice, dtype: mx.Dtype, tokens: int
) -> None:
    weight = drawn_weight(data, 128, dtype)
    inputs = np.random.default_rng(tokens).standard_normal((tokens, 128)).astype(np.float32)
    gram = mx.array(inputs.T @ inputs / tokens)
    exact = weight.astype(mx.float32)
    losses = []
    for packed in (
        pack_full(weight, choice, gram, float_dtype=dtype),
        pack_fast(weight, choice, mx.diag(gram), float_dtype=dtype),
    ):
        error = unpack(packed, choice) - exact
        losses.append(np.array(((error @ gram) * error).sum(-1)))
    floor = 1e-9 * np.array(((exact @ mx.abs(gram)) * mx.abs(exact)).sum(-1))
    assert (losses[0] <= losses[1] * (1 + 1e-3) + np.abs(floor)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from(AFFINE_BITS), runs=st.integers(1, 5))
def test_codes_survive_packing(data: st.DataObject, bits: int, runs: int) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 32 * runs)).astype(np.uint8)
    assert np.array_equal(codes_of(join_codes(codes, bits), bits), codes)


def one_row(packed, row):  # type: ignore[no-untyped-def]
    """The packed tensor of a single row."""
    rows = slice(row, row + 1)
    return type(packed)(weight=packed.weight[rows], scales=packed.scales[rows], biases=packed.biases[rows])
