"""Divergence between logits, against a float64 reference, on both implementations."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.measure import divergence
from mlx_optiq_ext.measure.divergence import (
    kl_divergence,
    kl_loss,
    negative_log_likelihood,
    top1_agreement,
)


@pytest.fixture(params=["rows", "arrays"], autouse=True)
def implementation(request, monkeypatch):
    """Every test runs over the NumPy rows and over the MLX arrays."""
    monkeypatch.setattr(divergence, "_on_cpu", lambda: request.param == "rows")


def log_softmax(scores):
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def exact_kl(reference, logits):
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def random_logits(rng, shape, scale=4.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0])
def test_matches_float64_from_tiny_to_huge_divergence(noise):
    rng = np.random.default_rng(3)
    reference = random_logits(rng, (2, 5, 3001)) + 17.0
    logits = reference + random_logits(rng, reference.shape, noise)
    expected = exact_kl(reference, logits)
    measured = np.asarray(kl_divergence(mx.array(reference), mx.array(logits)))
    assert measured.shape == (2, 5)
    assert measured.dtype == np.float32
    # The logits' own rounding at 30 is 2e-6; its effect is of order 2e-6 times the noise.
    np.testing.assert_allclose(measured, expected, rtol=2e-4, atol=3e-6 * min(noise, 1.0))


def test_is_zero_for_equal_logits_and_for_a_constant_shift():
    reference = random_logits(np.random.default_rng(0), (3, 4, 257))
    assert np.asarray(kl_divergence(mx.array(reference), mx.array(reference))).max() == 0.0
    shifted = np.asarray(kl_divergence(mx.array(reference), mx.array(reference + 3.0)))
    assert shifted.max() < 1e-11
    assert shifted.min() >= 0.0


def test_is_not_symmetric():
    reference = mx.array([[4.0, 0.0, 0.0]])
    other = mx.array([[0.0, 0.0, 0.0]])
    forward, backward = kl_divergence(reference, other).item(), kl_divergence(other, reference).item()
    assert forward == pytest.approx(exact_kl(np.array([4.0, 0, 0]), np.zeros(3)), rel=1e-5)
    assert backward == pytest.approx(exact_kl(np.zeros(3), np.array([4.0, 0, 0])), rel=1e-5)
    assert abs(forward - backward) > 0.1


def test_opposite_certainties_do_not_overflow():
    reference = mx.array([[300.0, 0.0, -300.0]])
    logits = mx.array([[-300.0, 0.0, 300.0]])
    assert kl_divergence(reference, logits).item() == pytest.approx(600.0, rel=1e-6)


def test_tokens_masked_in_both_count_as_absent():
    rng = np.random.default_rng(5)
    reference, logits = random_logits(rng, (1, 40)), random_logits(rng, (1, 40))
    expected = exact_kl(reference[:, :30], logits[:, :30])
    reference[:, 30:] = logits[:, 30:] = -np.inf
    measured = kl_divergence(mx.array(reference), mx.array(logits))
    assert measured.item() == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_broken_candidate_is_refused_with_its_position(bad):
    reference = random_logits(np.random.default_rng(1), (1, 6, 50))
    logits = reference.copy()
    logits[0, 2, int(reference[0, 2].argmax())] = bad
    with pytest.raises(MeasurementError, match=r"1 of 6 positions \(first: 2\)"):
        kl_divergence(mx.array(reference), mx.array(logits))


@pytest.mark.parametrize("function", [kl_divergence, top1_agreement])
def test_different_shapes_are_refused(function):
    with pytest.raises(MeasurementError, match="same windows"):
        function(mx.zeros((2, 3, 4)), mx.zeros((2, 2, 4)))


def test_pieces_give_the_same_as_one_piece(monkeypatch):
    rng = np.random.default_rng(2)
    reference, logits = mx.array(random_logits(rng, (3, 7, 64))), mx.array(random_logits(rng, (3, 7, 64)))
    whole = np.asarray(kl_divergence(reference, logits))
    same = np.asarray(top1_agreement(reference, logits))
    monkeypatch.setattr(divergence, "_PIECE_NUMEL", 5 * 64)
    np.testing.assert_array_equal(np.asarray(kl_divergence(reference, logits)), whole)
    np.testing.assert_array_equal(np.asarray(top1_agreement(reference, logits)), same)


def test_half_precision_logits_are_widened_before_any_sum():
    rng = np.random.default_rng(4)
    reference = mx.array(random_logits(rng, (4, 500))).astype(mx.bfloat16)
    logits = mx.array(random_logits(rng, (4, 500))).astype(mx.bfloat16)
    expected = exact_kl(
        np.array(reference.astype(mx.float32)),
        np.array(logits.astype(mx.float32)),
    )
    np.testing.assert_allclose(np.asarray(kl_divergence(reference, logits)), expected, rtol=1e-5)


def test_top1_agreement_counts_equal_first_ranks():
    reference = mx.array([[[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]])
    logits = mx.array([[[0.0, 9.0, 1.0], [0.0, 0.1, 0.0]]])
    same = top1_agreement(reference, logits)
    assert same.dtype == mx.bool_
    assert same.tolist() == [[True, False]]


def test_loss_has_the_gradient_of_the_divergence():
    rng = np.random.default_rng(6)
    reference, logits = random_logits(rng, (2, 33), 2.0), random_logits(rng, (2, 33), 2.0)
    gradient = mx.grad(lambda scores: kl_loss(mx.array(reference), scores).sum())(mx.array(logits))
    # d KL / d logits = q − p
    expected = np.exp(log_softmax(logits)) - np.exp(log_softmax(reference))
    np.testing.assert_allclose(np.asarray(gradient), expected, atol=2e-6)


def test_loss_gradient_stays_finite_where_the_models_are_far_apart():
    gradient = mx.grad(lambda scores: kl_loss(mx.array([[200.0, 0.0]]), scores).sum())(
        mx.array([[-200.0, 0.0]])
    )
    assert np.isfinite(np.asarray(gradient)).all()


def test_negative_log_likelihood_scores_the_next_token():
    rng = np.random.default_rng(7)
    logits = random_logits(rng, (2, 5, 11))
    tokens = rng.integers(0, 11, (2, 5)).astype(np.int32)
    expected = -np.take_along_axis(log_softmax(logits)[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[
        ..., 0
    ]
    nll = negative_log_likelihood(mx.array(logits), mx.array(tokens))
    np.testing.assert_allclose(np.asarray(nll), expected, rtol=1e-5)
    with pytest.raises(MeasurementError, match="W, T"):
        negative_log_likelihood(mx.array(logits), mx.array(tokens[:, :-1]))


def test_uniform_logits_give_every_token_one_share_of_the_vocabulary():
    nll = negative_log_likelihood(mx.zeros((1, 9, 77)), mx.zeros((1, 9), dtype=mx.int32))
    np.testing.assert_allclose(np.asarray(nll), math.log(77.0), rtol=1e-6)
