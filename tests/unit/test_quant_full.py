"""Error-feedback rounding: never worse than fast, in plain storage, for matrices and experts."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.errors import MeasurementError, ModelError, UsageError
from mlx_optiq_ext.quant.correct import gram_error, pack, pack_fast, pack_full, pack_plain, unpack
from mlx_optiq_ext.quant.gptq import feedback_rows, prepare_feedback, refine_rows, row_losses
from mlx_optiq_ext.types.quant import AFFINE_BITS, AFFINE_GROUPS, Choice

AFFINE = [Choice(bits=bits, group_size=group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]


def random_weight(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * 0.05


def gram_of(width: int, tokens: int = 400, seed: int = 1) -> mx.array:
    """E[x xᵀ] of correlated inputs with one outlier column."""
    mix, x = (mx.random.normal((n, width), key=mx.random.key(seed + n)) for n in (width, tokens))
    x = x + 0.3 * (x @ mix)
    x[:, 3] = x[:, 3] * 30
    return (x.T @ x) / tokens


def per_row(weight: mx.array, values: mx.array, gram: mx.array) -> np.ndarray:
    error = values - weight
    return np.array((error * (error @ gram)).sum(-1))


@pytest.mark.parametrize("choice", AFFINE, ids=lambda choice: choice.label)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
def test_full_beats_fast_row_by_row(choice: Choice, dtype: mx.Dtype) -> None:
    weight, gram = random_weight(16, 128).astype(dtype), gram_of(128)
    plain = pack_plain(weight, choice, float_dtype=dtype)
    fast = pack_fast(weight, choice, mx.diag(gram), float_dtype=dtype)
    full = pack_full(weight, choice, gram, float_dtype=dtype)
    assert full.biases is not None
    assert plain.biases is not None
    assert (full.weight.shape, full.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    assert (full.scales.shape, full.scales.dtype) == (plain.scales.shape, plain.scales.dtype)
    assert (full.biases.shape, full.biases.dtype) == (plain.biases.shape, plain.biases.dtype)
    exact = weight.astype(mx.float32)
    ours, theirs = (per_row(exact, unpack(p, choice), gram) for p in (full, fast))
    # Float32 sums of a few hundred terms.
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert float(gram_error(weight, full, choice, gram)) < 0.9 * theirs.sum()


def test_experts_are_corrected_with_their_own_gram() -> None:
    choice, weight = Choice.parse("3g32"), random_weight(3, 8, 64)
    grams = mx.stack([gram_of(64, seed=seed) for seed in range(3)])
    together = pack_full(weight, choice, grams, float_dtype=mx.bfloat16)
    for expert in range(3):
        alone = pack_full(weight[expert], choice, grams[expert], float_dtype=mx.bfloat16)
        assert mx.array_equal(together.weight[expert], alone.weight)


def test_a_shared_gram_serves_all_experts() -> None:
    choice, weight, gram = Choice.parse("4g32"), random_weight(2, 8, 64), gram_of(64)
    together = pack_full(weight, choice, gram, float_dtype=mx.bfloat16)
    alone = pack_full(weight[1], choice, gram, float_dtype=mx.bfloat16)
    assert mx.array_equal(together.weight[1], alone.weight)


def test_chunking_rows_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, weight, gram = Choice.parse("4g64"), random_weight(40, 128), gram_of(128)
    whole = unpack(pack_full(weight, choice, gram, float_dtype=mx.bfloat16), choice)
    monkeypatch.setattr("mlx_optiq_ext.quant.full._CPU_ROWS", 7)
    chunked = unpack(pack_full(weight, choice, gram, float_dtype=mx.bfloat16), choice)
    # A matrix product of another shape may sum in another order and tip a rounding.
    assert float((whole == chunked).mean()) > 0.98


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_few_or_no_inputs_still_give_sensible_weights(tokens: int) -> None:
    choice, weight = Choice.parse("4g32"), random_weight(8, 64)
    gram = gram_of(64, tokens=tokens) if tokens else mx.zeros((64, 64))
    full = pack_full(weight, choice, gram, float_dtype=mx.bfloat16)
    assert float(mx.abs(unpack(full, choice) - weight).max()) < 0.1


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_tensors_are_stored_exactly(bits: int, value: float) -> None:
    choice, weight = Choice(bits=bits, group_size=32), mx.full((2, 64), value)
    packed = pack_full(weight, choice, gram_of(64), float_dtype=mx.bfloat16)
    assert np.array_equal(np.array(unpack(packed, choice)), np.array(weight))


def test_one_zero_group_among_others_stays_zero_sized() -> None:
    choice, weight = Choice.parse("4g32"), random_weight(6, 96)
    weight[:, 32:64] = 0
    packed = pack_full(weight, choice, gram_of(96), float_dtype=mx.bfloat16)
    values = unpack(packed, choice)
    assert bool(mx.isfinite(values).all())
    assert float(mx.abs(values[:, 32:64]).max()) < 0.05


def test_huge_outlier_weight_stays_finite() -> None:
    choice, weight = Choice.parse("4g64"), random_weight(4, 128)
    weight[1, 70] = 3.0e4
    packed = pack_full(weight, choice, gram_of(128), float_dtype=mx.bfloat16)
    assert bool(mx.isfinite(unpack(packed, choice)).all())


def test_float_modes_are_stored_as_fast_does() -> None:
    choice, weight, gram = Choice.parse("mxfp4"), random_weight(4, 64), gram_of(64)
    full = pack_full(weight, choice, gram, float_dtype=mx.bfloat16)
    fast = pack_fast(weight, choice, mx.diag(gram), float_dtype=mx.bfloat16)
    assert mx.array_equal(full.weight, fast.weight)
    assert mx.array_equal(full.scales, fast.scales)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (mx.ones((32, 32)), "shape"),
        (mx.full((64, 64), float("nan")), "non-finite"),
        (-mx.ones((64, 64)) + 1.5 * mx.eye(64), "not positive semi-definite"),
        (-mx.eye(64), "negative"),
    ],
)
def test_unusable_grams_are_refused(gram: mx.array, message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        pack_full(random_weight(4, 64), Choice.parse("4g64"), gram, float_dtype=mx.bfloat16)


def test_non_finite_weights_are_refused() -> None:
    weight = random_weight(4, 64)
    weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="holds 1 non-finite"):
        pack_full(weight, Choice.parse("4g64"), gram_of(64), float_dtype=mx.bfloat16)


def test_levels_ask_for_what_they_need() -> None:
    choice, weight, gram = Choice.parse("4g64"), random_weight(4, 64), gram_of(64)
    with pytest.raises(UsageError, match="Gram"):
        pack(weight, choice, level="full", float_dtype=mx.bfloat16, importance=mx.diag(gram))
    from_gram = pack(weight, choice, level="fast", float_dtype=mx.bfloat16, gram=gram)
    from_diagonal = pack(weight, choice, level="fast", float_dtype=mx.bfloat16, importance=mx.diag(gram))
    assert mx.array_equal(from_gram.weight, from_diagonal.weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_refinement_never_raises_a_row_and_agrees_on_both_array_kinds(bits: int) -> None:
    weight, gram = np.array(random_weight(12, 128)).T.copy(), np.array(gram_of(128))
    losses = {}
    for xp in (np, mx):
        feedback = prepare_feedback(gram, xp)
        columns = xp.array(weight)
        settings = {"bits": bits, "dtype": mx.bfloat16, "xp": xp}
        rounded = feedback_rows(columns, feedback, group_size=64, **settings)
        refined = refine_rows(columns, rounded, feedback, **settings)
        before, after = (
            np.array(row_losses(c.values() - columns, feedback.gram)) for c in (rounded, refined)
        )
        assert (after <= before * (1 + 1e-4)).all()
        losses[xp.__name__] = after.sum()
    first, second = losses.values()
    assert abs(first - second) < 0.05 * first


@pytest.mark.parametrize("shape", [(12, 128), (3, 8, 128)])
@pytest.mark.parametrize("level", ["fast", "full"])
def test_mlx_arrays_give_what_numpy_gives(
    shape: tuple[int, ...], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, weight, gram = Choice.parse("4g64"), random_weight(*shape), gram_of(128)
    if len(shape) == 3:
        gram = mx.stack([gram, 2 * gram, gram_of(128, seed=9)])
    settings = {"level": level, "float_dtype": mx.bfloat16, "gram": gram}
    in_numpy = pack(weight, choice, **settings)
    for module in ("fast", "full"):
        monkeypatch.setattr(f"mlx_optiq_ext.quant.{module}.on_cpu", lambda: False)
    in_mlx = pack(weight, choice, **settings)
    first, second = (float(gram_error(weight, packed, choice, gram)) for packed in (in_numpy, in_mlx))
    # Sums in another order may tip single roundings and with them what follows.
    assert abs(first - second) < 0.03 * first
    assert in_numpy.weight.shape == in_mlx.weight.shape
