"""Means over windows, paired comparisons and rank correlation."""

import math

import numpy as np
import pytest

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.measure.intervals import (
    by_domain,
    estimate_mean,
    paired_ratio,
    spearman,
)


def test_the_window_is_the_sample_not_the_position():
    values = np.repeat([[1.0], [2.0], [4.0], [5.0]], 100, axis=1)
    estimate = estimate_mean(values)
    assert estimate.mean == 3.0
    assert estimate.num_windows == 4
    assert estimate.stderr == pytest.approx(np.std([1, 2, 4, 5], ddof=1) / 2)
    assert estimate.high - estimate.mean == pytest.approx(3.182446 * estimate.stderr)


def test_spread_between_domains_is_no_error_once_each_has_two_windows():
    values = np.array([0.0, 2.0, 10.0, 12.0])
    estimate = estimate_mean(values, [0, 0, 1, 1])
    assert estimate.mean == 6.0
    assert estimate.stderr == pytest.approx(math.sqrt((2 / 2 + 2 / 2) / 4))
    assert estimate_mean(values).stderr > 2 * estimate.stderr


def test_domains_weigh_alike_however_many_windows_they_have():
    assert estimate_mean([1.0, 1.0, 1.0, 5.0], [0, 0, 0, 1]).mean == 3.0


def test_one_window_has_no_spread():
    estimate = estimate_mean([[0.5, 1.5]])
    assert (estimate.mean, estimate.stderr, estimate.low, estimate.high) == (1.0, 0.0, 1.0, 1.0)


def test_by_domain_keeps_the_order_and_marks_the_missing():
    means = by_domain([[1.0, 3.0], [7.0, 7.0], [4.0, 4.0]], [2, 0, 2], 3)
    assert means[0] == 7.0
    assert math.isnan(means[1])
    assert means[2] == 3.0


def test_pairing_sees_a_small_difference_between_unequal_windows():
    rng = np.random.default_rng(0)
    difficulty = rng.exponential(1.0, 24)
    first = 1.02 * difficulty * np.exp(rng.normal(0, 0.01, 24))
    ratio = paired_ratio(first, difficulty)
    assert ratio.mean == pytest.approx(1.02, abs=0.01)
    assert 1.0 < ratio.low < ratio.high < 1.04
    assert estimate_mean(first).low < estimate_mean(difficulty).mean


def test_ratio_weighs_domains_alike_and_leaves_their_difference_out_of_the_error():
    second = np.array([1.0, 1.0, 1.0, 1.0, 10.0, 10.0])
    first = np.array([0.9, 1.1, 0.9, 1.1, 4.9, 5.1])
    domains = [0, 0, 0, 0, 1, 1]
    ratio = paired_ratio(first, second, domains)
    assert ratio.mean == pytest.approx((1.0 + 5.0) / (1.0 + 10.0))
    assert paired_ratio(first, second).stderr > 2 * ratio.stderr
    assert ratio.half_width == pytest.approx(2.776445 * ratio.stderr)  # six windows, two domains


def test_ratio_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    domains = np.repeat(np.arange(4), 4)
    level = np.array([0.5, 1.0, 2.0, 1.0])[domains]
    covered = []
    for _ in range(1000):
        difficulty = level * np.exp(0.4 * rng.standard_normal(16))
        base, other = (difficulty * np.exp(0.1 * rng.standard_normal(16)) for _ in range(2))
        ratio = paired_ratio(0.5 * other, base, domains)
        covered.append(ratio.low <= 0.5 <= ratio.high)
    assert 0.93 < np.mean(covered) < 0.97  # three binomial standard errors


def test_ratio_of_proportional_values_is_exact():
    values = np.random.default_rng(1).exponential(1.0, (10, 3))
    ratio = paired_ratio(0.4 * values, values)
    assert ratio.mean == pytest.approx(0.4)
    assert ratio.stderr == pytest.approx(0.0, abs=1e-12)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    estimates = [estimate_mean(rng.normal(1.0, 2.0, 9)) for _ in range(2000)]
    covered = np.mean([e.low <= 1.0 <= e.high for e in estimates])
    assert 0.935 < covered < 0.965  # three binomial standard errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_mean([]), "nothing to average"),
        (lambda: estimate_mean([[1.0], [math.nan]]), "window 1"),
        (lambda: estimate_mean([1.0, 2.0], [0]), "there are 2 windows"),
        (lambda: paired_ratio([1.0], [1.0, 2.0]), "same windows"),
        (lambda: paired_ratio([1.0], [0.0]), "undefined"),
        (lambda: spearman([1.0], [1.0, 2.0]), "1 with 2"),
        (lambda: spearman([1.0, math.inf], [1.0, 2.0]), "not finite"),
    ],
)
def test_unusable_values_are_refused(call, message):
    with pytest.raises(MeasurementError, match=message):
        call()


def test_spearman_of_known_ranks():
    # Textbook case without ties: 1 − 6·Σd² / (n(n² − 1)) with d = (1, 1, −2, 0), n = 4.
    assert spearman([2, 3, 1, 4], [10, 20, 30, 40]) == pytest.approx(1 - 6 * 6 / 60)
    # Ties: ranks (1.5, 1.5, 3) and (1, 2, 3).
    assert spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert spearman([1, 2, 3], [9, 4, -1]) == -1.0
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [2]))
