"""Means with their uncertainty, paired comparisons and rank correlation; NumPy only.

Positions of one window depend on each other, so the window, not the position, is what counts as one sample.
"""

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_optiq_ext.errors import MeasurementError

__all__ = ["Estimate", "by_domain", "estimate_mean", "paired_ratio", "spearman"]

_Floats = NDArray[np.float64]
_Z95 = 1.959963984540054
# Two-sided 95 % points of Student's t for 1 to 6 degrees of freedom, where the expansion below is too coarse.
_T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over windows, its standard error and its 95 % interval."""

    mean: float
    stderr: float
    """Zero where there is one window only: then nothing is known about the spread."""
    num_windows: int
    low: float
    """Lower end of the interval, in the unit of the values."""
    high: float
    """Upper end."""
    half_width: float
    """Of the interval: Student's t times ``stderr``."""


def estimate_mean(values: ArrayLike, domain_index: ArrayLike | None = None) -> Estimate:
    """Mean of a per-position or per-window quantity, with the spread over windows.

    Args:
        values: Shape (W, T) or (W,); positions are averaged within their window first.
        domain_index: Domain of every window, (W,). With it the mean is the mean of the domain means, and
            where every domain has two windows or more, only the spread within domains counts as error.
    Returns:
        Estimate; its interval uses Student's t.
    Raises:
        MeasurementError: No windows, or values that are not finite.
    """
    windows = _window_means(values)
    count = len(windows)
    groups = [windows[group] for group in _groups(count, domain_index)]
    mean = float(np.mean([group.mean() for group in groups]))
    if min(len(group) for group in groups) >= 2:
        variance = sum(float(group.var(ddof=1)) / len(group) for group in groups) / len(groups) ** 2
        freedom = count - len(groups)
    else:
        variance = float(windows.var(ddof=1)) / count if count > 1 else 0.0
        freedom = count - 1
    return _estimate(mean, math.sqrt(variance), count, freedom)


def by_domain(values: ArrayLike, domain_index: ArrayLike, num_domains: int) -> tuple[float, ...]:
    """Mean per domain, in the order of the indices; NaN for a domain without windows.

    Args:
        values: Shape (W, T) or (W,).
        domain_index: Shape (W,), in 0 … ``num_domains`` − 1.
        num_domains: Length of the result.
    """
    windows = _window_means(values)
    domains = _domains(domain_index, len(windows))
    groups = (windows[domains == domain] for domain in range(num_domains))
    return tuple(float(group.mean()) if group.size else math.nan for group in groups)


def paired_ratio(first: ArrayLike, second: ArrayLike, domain_index: ArrayLike | None = None) -> Estimate:
    """Ratio of the means of two quantities scored on the same windows, by the jackknife over windows.

    Pairing removes what both share (some windows are harder for every model), which makes the interval far
    narrower than those of two separate means suggest.

    Args:
        first: Shape (W, T) or (W,).
        second: The same shape.
        domain_index: As in :func:`estimate_mean`.
    Raises:
        MeasurementError: The two do not have the same windows, or the second has mean zero.
    """
    a, b = _window_means(first), _window_means(second)
    if a.shape != b.shape:
        raise MeasurementError(
            f"paired values of {len(a)} and {len(b)} windows; score both on the same windows"
        )
    if b.sum() == 0:
        raise MeasurementError("the ratio of two means is undefined: the second is zero in every window")
    groups = _groups(len(a), domain_index)
    # Every domain weighs alike, so windows weigh by how few their domain has.
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    order = np.concatenate(groups)
    ratio = float((weights * a[order]).sum() / (weights * b[order]).sum())
    strata = groups if min(map(len, groups)) >= 2 else [order]
    variance = sum(_jackknife_variance(a, b, groups, stratum) for stratum in strata)
    return _estimate(ratio, math.sqrt(variance), len(a), len(a) - len(strata))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation in −1 … 1, equal values sharing their average rank.

    Returns:
        NaN for fewer than two values, or where one side is constant.
    Raises:
        MeasurementError: Lengths differ, or a value is not finite.
    Source: Spearman 1904; Pearson's coefficient of average ranks.
    """
    a, b = (np.asarray(values, dtype=np.float64).ravel() for values in (first, second))
    if a.shape != b.shape:
        raise MeasurementError(f"rank correlation of {a.size} with {b.size} values")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise MeasurementError("rank correlation of values that are not finite")
    if a.size < 2:
        return math.nan
    x, y = (_average_ranks(values) - (a.size + 1) / 2 for values in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip((x @ y) / scale, -1.0, 1.0)) if scale else math.nan


def _average_ranks(values: _Floats) -> _Floats:
    """Ranks from 1; equal values get the mean of the ranks they occupy."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2
    return np.asarray(mean_rank[inverse.ravel()], dtype=np.float64)


def _window_means(values: ArrayLike) -> _Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.size == 0:
        raise MeasurementError(f"nothing to average: values have shape {array.shape}")
    means: _Floats = array.reshape(len(array), -1).mean(axis=1)
    if not np.isfinite(means).all():
        bad = int(np.flatnonzero(~np.isfinite(means))[0])
        raise MeasurementError(f"window {bad} holds values that are not finite")
    return means


def _domains(domain_index: ArrayLike, count: int) -> NDArray[Any]:
    domains = np.asarray(domain_index)
    if domains.shape != (count,):
        raise MeasurementError(f"domain_index has shape {domains.shape}, but there are {count} windows")
    return domains


def _groups(count: int, domain_index: ArrayLike | None) -> list[NDArray[np.intp]]:
    """Windows of every domain; all in one where no domains are given."""
    if domain_index is None:
        return [np.arange(count)]
    domains = _domains(domain_index, count)
    return [np.flatnonzero(domains == domain) for domain in np.unique(domains)]


def _jackknife_variance(
    a: _Floats, b: _Floats, groups: list[NDArray[np.intp]], stratum: NDArray[np.intp]
) -> float:
    """Variance of the ratio of means that comes from the windows of ``stratum``."""
    left_out = []
    for window in stratum:
        kept = [group[group != window] for group in groups]
        above, below = (sum(x[group].mean() for group in kept if group.size) for x in (a, b))
        left_out.append(above / below if below else math.nan)
    values = np.asarray(left_out)
    count = len(values)
    return (count - 1) / count * float(((values - values.mean()) ** 2).sum())


def _estimate(mean: float, stderr: float, count: int, freedom: int) -> Estimate:
    half = _t95(freedom) * stderr
    return Estimate(
        mean=mean, stderr=stderr, num_windows=count, low=mean - half, high=mean + half, half_width=half
    )


def _t95(freedom: int) -> float:
    """Two-sided 95 % point of Student's t.

    Source: Abramowitz and Stegun 26.7.5, to the third power of 1/freedom (error below 2e-3 from 7 on).
    """
    if freedom < 1:
        return 0.0
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
