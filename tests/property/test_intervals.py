"""What must hold of divergence and rank correlation for any numbers."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_optiq_ext.measure.divergence import kl_divergence, kl_loss
from mlx_optiq_ext.measure.intervals import paired_ratio, spearman

finite = st.floats(-50, 50, width=32)
integers = st.lists(st.integers(-5, 5), min_size=3, max_size=30)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 3, 17), elements=finite), arrays(np.float32, (2, 3, 17), elements=finite))
def test_both_forms_of_the_divergence_agree_and_are_never_negative(reference, logits):
    rows = np.asarray(kl_divergence(mx.array(reference), mx.array(logits)))
    lazy = np.asarray(kl_loss(mx.array(reference), mx.array(logits)))
    assert (rows >= 0).all()
    assert (lazy >= 0).all()
    np.testing.assert_allclose(rows, lazy, rtol=1e-4, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (1, 17), elements=finite), arrays(np.float32, (1, 17), elements=finite), finite)
def test_divergence_ignores_constants_and_the_order_of_tokens(reference, logits, shift):
    def kl(a, b):
        return kl_divergence(mx.array(a), mx.array(b)).item()

    before = kl(reference, logits)
    # Adding a constant rounds the logits by up to 4e-6, which a divergence of up to 100 multiplies.
    assert kl(reference, logits + np.float32(shift)) == pytest.approx(before, rel=1e-4, abs=1e-4)
    assert kl(reference[:, ::-1].copy(), logits[:, ::-1].copy()) == pytest.approx(before, rel=1e-5, abs=1e-6)


@given(integers, st.data())
def test_rank_correlation_is_symmetric_bounded_and_blind_to_monotone_maps(values, data):
    other = data.draw(st.lists(st.integers(-5, 5), min_size=len(values), max_size=len(values)))
    assume(len(set(values)) > 1 and len(set(other)) > 1)
    rho = spearman(values, other)
    assert -1.0 <= rho <= 1.0
    assert rho == pytest.approx(spearman(other, values))
    assert rho == pytest.approx(spearman(np.exp(values), other))
    assert rho == pytest.approx(-spearman(values, -np.array(other)))
    assert spearman(values, values) == pytest.approx(1.0)


@given(
    arrays(np.float64, (8, 3), elements=st.floats(0.1, 10)),
    arrays(np.float64, (8, 3), elements=st.floats(0.1, 10)),
    st.sampled_from([None, [0] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]),
    st.floats(0.01, 100),
)
def test_paired_ratio_scales_with_its_first_and_is_one_of_equals(first, second, domains, factor):
    ratio = paired_ratio(first, second, domains)
    scaled = paired_ratio(factor * first, second, domains)
    assert scaled.mean == pytest.approx(factor * ratio.mean)
    assert scaled.half_width == pytest.approx(factor * ratio.half_width, rel=1e-6, abs=1e-9)
    assert ratio.low <= ratio.mean <= ratio.high
    same = paired_ratio(first, first, domains)
    assert (same.mean, same.half_width) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
