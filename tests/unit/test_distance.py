import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.eval.distance import compare_window, log_softmax_rows, mean_and_stderr, paired_ratio


def random_rows(seed: int, tokens: int = 7, vocab: int = 40, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((tokens, vocab)) * spread).astype(np.float32)


def float64_numbers(
    reference: np.ndarray, other: np.ndarray, tokens: np.ndarray
) -> tuple[float, float, float]:
    """The same by definition, in float64."""
    logs = [
        x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
        for x in (reference, other)
    ]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    nll = -np.mean([logs[1][t, tokens[t + 1]] for t in range(len(tokens) - 1)])
    return divergence, (logs[0].argmax(-1) == logs[1].argmax(-1)).mean(), nll


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.integers(2, 20),
    vocab=st.integers(2, 300),
    spread=st.floats(0.1, 20),
    change=st.floats(0, 2),
)
def test_numbers_agree_with_their_definition(
    seed: int, tokens: int, vocab: int, spread: float, change: float
) -> None:
    reference = random_rows(seed, tokens, vocab, spread)
    other = reference + np.float32(change) * random_rows(seed + 1, tokens, vocab, 1.0)
    text = np.random.default_rng(seed).integers(0, vocab, tokens).astype(np.int32)
    expected = float64_numbers(reference, other, text)
    found = compare_window(log_softmax_rows(reference.copy()), log_softmax_rows(other.copy()), text)
    # float32 rounding of logits up to 80 in size is 5e-6 each.
    assert found.divergence == pytest.approx(max(expected[0], 0), rel=1e-4, abs=2e-5)
    assert found.top1 == pytest.approx(expected[1], abs=1e-9)
    assert found.nll == pytest.approx(expected[2], rel=1e-4, abs=2e-5)


def test_rows_beyond_one_chunk_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other = random_rows(0, 33, 50), random_rows(1, 33, 50)
    text = np.arange(33, dtype=np.int32)
    whole = compare_window(log_softmax_rows(reference.copy()), log_softmax_rows(other.copy()), text)
    monkeypatch.setattr("mlx_optiq_ext.eval.distance._CHUNK_NUMEL", 200)
    pieces = compare_window(log_softmax_rows(reference), log_softmax_rows(other), text)
    assert pieces.divergence == pytest.approx(whole.divergence, rel=1e-6)
    assert (pieces.top1, pieces.nll) == (whole.top1, whole.nll)


def test_model_equal_to_its_reference_is_at_zero() -> None:
    rows = log_softmax_rows(random_rows(3))
    numbers = compare_window(rows, rows, np.zeros(7, dtype=np.int32))
    assert (numbers.divergence, numbers.top1) == (0.0, 1.0)


def test_logits_that_are_not_finite_are_refused() -> None:
    rows = log_softmax_rows(random_rows(3))
    broken = rows.copy()
    broken[2, 5] = np.nan
    with pytest.raises(MeasurementError, match="not finite"):
        compare_window(rows, broken, np.zeros(7, dtype=np.int32))


def test_stderr_is_that_of_the_mean_over_windows() -> None:
    assert mean_and_stderr([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3 / 4)))
    assert mean_and_stderr([7.0]) == (7.0, 0.0)


def test_paired_interval_covers_the_true_ratio_and_is_narrower_than_the_windows_spread() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        difficulty = np.exp(rng.standard_normal(24))
        base = difficulty * np.exp(0.1 * rng.standard_normal(24))
        paired = paired_ratio(0.5 * difficulty * np.exp(0.1 * rng.standard_normal(24)), base)
        assert paired is not None
        covered += paired.low <= 0.5 <= paired.high
        assert (paired.high - paired.low) / paired.ratio < 0.5
    # 95 % nominal; with 24 skewed windows the linear expansion covers a little less.
    assert 0.86 <= covered / 400 <= 1.0


def test_ratio_of_zeros() -> None:
    assert paired_ratio([1.0, 2.0], [0.0, 0.0]) is None
    zero = paired_ratio([0.0, 0.0], [1.0, 2.0])
    assert zero is not None
    assert (zero.ratio, zero.low, zero.high) == (0.0, 0.0, 0.0)
