"""Numbers of a model on text: divergence from the reference, agreement, likelihood, with their spread.

Plain NumPy on cache-sized rows, the same on every back end.
Knows nothing of models; called by ``eval.score``.
"""

import math

import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import MeasurementError

__all__ = [
    "PairedRatio",
    "WindowNumbers",
    "compare_window",
    "log_softmax_rows",
    "mean_and_stderr",
    "paired_ratio",
]

FloatRows = npt.NDArray[np.float32]

_CHUNK_NUMEL = 1 << 18
_Z95 = 1.959964


class WindowNumbers(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one model, means over its positions."""

    divergence: float
    """KL(reference ‖ model), nats per token."""
    top1: float
    """Share of positions whose most likely token is the reference's."""
    nll: float
    """Negative log likelihood of the next token, nats, over all positions that have one."""


class PairedRatio(msgspec.Struct, frozen=True, kw_only=True):
    """Mean of one model over mean of another on the same windows, with its 95 % interval."""

    ratio: float
    low: float
    high: float


def log_softmax_rows(logits: FloatRows) -> FloatRows:
    """Log probabilities, in place, row by row.

    Args:
        logits: (N, V) float32; overwritten.
    Returns:
        The same array.
    """
    for rows in _chunks(logits):
        rows -= rows.max(axis=-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return logits


def compare_window(
    reference: FloatRows, log_probabilities: FloatRows, tokens: npt.NDArray[np.int32]
) -> WindowNumbers:
    """Compare one window's log probabilities with the reference's.

    Args:
        reference: (T, V) log probabilities of the reference, float32.
        log_probabilities: (T, V) of the model; may be the same array.
        tokens: (T,) the window's tokens: position t predicts token t + 1.
    Raises:
        MeasurementError: A number is not finite.
    Cost: one exponential per entry; sums of a row in float32, over rows in float64.
    """
    divergence, agreeing = 0.0, 0
    for start, rows in _numbered_chunks(reference):
        other = log_probabilities[start : start + len(rows)]
        probabilities = np.exp(rows)
        divergence += float(np.einsum("ij,ij->i", probabilities, rows - other).sum(dtype=np.float64))
        agreeing += int((rows.argmax(axis=-1) == other.argmax(axis=-1)).sum())
    num_tokens = len(tokens)
    following = log_probabilities[np.arange(num_tokens - 1), tokens[1:]]
    nll = float(-following.mean(dtype=np.float64))
    if not (math.isfinite(divergence) and math.isfinite(nll)):
        raise MeasurementError(
            f"divergence {divergence}, likelihood {nll}: the model's logits are not finite"
        )
    # Rounding can leave a model equal to its reference a hair below zero.
    return WindowNumbers(divergence=max(divergence / num_tokens, 0.0), top1=agreeing / num_tokens, nll=nll)


def mean_and_stderr(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean over windows and its standard error (0 for a single window)."""
    array = np.asarray(values, dtype=np.float64)
    stderr = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else 0.0
    return float(array.mean()), stderr


def paired_ratio(values: npt.ArrayLike, base: npt.ArrayLike) -> PairedRatio | None:
    """Ratio of means of two models over the same windows; None where the base is zero.

    The interval is that of the logarithm's linear expansion: windows that are hard for both cancel, so it
    is far narrower than two separate intervals suggest.
    """
    a, b = np.asarray(values, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if not b.mean() > 0:
        return None
    if not a.mean() > 0:
        return PairedRatio(ratio=0.0, low=0.0, high=0.0)
    ratio = float(a.mean() / b.mean())
    _, stderr = mean_and_stderr(a / a.mean() - b / b.mean())
    factor = math.exp(_Z95 * stderr)
    return PairedRatio(ratio=ratio, low=ratio / factor, high=ratio * factor)


def _numbered_chunks(rows: FloatRows) -> list[tuple[int, FloatRows]]:
    """Rows a few at a time, so that temporaries stay in the processor's cache."""
    step = max(1, _CHUNK_NUMEL // rows.shape[-1])
    return [(start, rows[start : start + step]) for start in range(0, len(rows), step)]


def _chunks(rows: FloatRows) -> list[FloatRows]:
    return [chunk for _, chunk in _numbered_chunks(rows)]
