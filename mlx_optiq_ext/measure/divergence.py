"""How far one model's next-token distribution is from another's, position by position.

Works on logits; knows nothing of models, windows or files. On the CPU the sums run in NumPy, row by row,
since MLX's elementwise kernels take about ten times as long there; on other devices in MLX, in pieces.
"""

import math
from collections.abc import Callable
from typing import TypeAlias, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import MeasurementError

__all__ = ["kl_divergence", "kl_loss", "negative_log_likelihood", "top1_agreement"]

_Floats: TypeAlias = NDArray[np.float32]

_PIECE_NUMEL = 1 << 24
"""Logits handled at once: 64 MiB in float32 for each array in flight."""
_FLOOR = -1e30
"""Stands for minus infinity, so that a masked token in both distributions contributes exactly nothing."""
_HOPELESS = 1e6
"""A divergence beyond this is a zero probability or a broken model, not a number to report."""


def kl_divergence(reference: mx.array, logits: mx.array) -> mx.array:
    """KL(reference ‖ logits) at every position, in nats; evaluated.

    Rounding of the normalisers has no first-order effect, so that divergences of 1e-6 are still meaningful.

    Args:
        reference: Scores of the reference model, shape (…, V), any float dtype; minus infinity masks a token.
        logits: Scores of the other model, same shape.
    Returns:
        Shape (…), float32, evaluated.
    Raises:
        MeasurementError: Shapes differ, or a position is NaN or infinite.
    Cost: 10 ns per logit on one CPU core; extra memory of a few rows (CPU) or 64 MiB pieces (elsewhere).
    """
    _check_shapes(reference, logits)
    row = _kl_row if _on_cpu() else None
    kl = _over_positions(row, kl_loss, reference, logits)
    bad = np.flatnonzero(~(np.asarray(kl) < _HOPELESS))
    if bad.size:
        raise MeasurementError(
            f"divergence is not finite at {bad.size} of {kl.size} positions (first: {int(bad[0])}); "
            "one of the models gives NaN, or no probability to a token that the reference allows"
        )
    return kl.reshape(reference.shape[:-1])


def kl_loss(reference: mx.array, logits: mx.array) -> mx.array:
    """The same as :func:`kl_divergence`, lazy, differentiable, in one piece and unchecked.

    Args:
        reference: Shape (…, V), any float dtype.
        logits: Same shape.
    Returns:
        Shape (…), float32, not evaluated. Memory: about six float32 arrays of the logits' shape.
    """
    log_p, log_q = _log_probs(reference), _log_probs(logits)
    p, d = mx.exp(log_p), log_p - log_q
    # Every term of Σ p·(d − 1 + e^−d) is ≥ 0, and its sum equals Σ p·d because p and q both sum to one: no
    # cancellation between tokens. Where q is much larger than p, p·e^−d is q itself, which cannot overflow.
    near = p * (d + mx.expm1(-mx.maximum(d, -1.0)))
    far = p * d + (mx.exp(log_q) - p)
    return mx.where(d > -1.0, near, far).sum(axis=-1)


def top1_agreement(reference: mx.array, logits: mx.array) -> mx.array:
    """Whether both models rank the same token first; shape (…) from (…, V), bool, evaluated.

    Raises:
        MeasurementError: Shapes differ.
    """
    _check_shapes(reference, logits)
    row = _same_top_row if _on_cpu() else None
    same = _over_positions(
        row, lambda a, b: mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1), reference, logits
    )
    return same.reshape(reference.shape[:-1]).astype(mx.bool_)


def negative_log_likelihood(logits: mx.array, tokens: mx.array) -> mx.array:
    """−log p of every token given those before it, in nats; evaluated.

    Args:
        logits: Shape (W, T, V), any float dtype.
        tokens: Ids, shape (W, T).
    Returns:
        Shape (W, T − 1), float32: position t scores token t + 1.
    Raises:
        MeasurementError: Shapes do not belong together.
    """
    if logits.ndim != 3 or tuple(tokens.shape) != tuple(logits.shape[:-1]):
        raise MeasurementError(
            f"logits {logits.shape} and tokens {tokens.shape} must be (W, T, V) and (W, T)"
        )
    scores, targets = logits[:, :-1], tokens[:, 1:]
    rows = []
    for window in range(scores.shape[0]):  # one window at a time bounds the memory
        target = targets[window][:, None]
        chosen = mx.take_along_axis(scores[window], target, axis=-1)[:, 0].astype(mx.float32)
        nll = _log_normaliser(scores[window])[:, 0] - chosen
        mx.eval(nll)
        rows.append(nll)
    return mx.stack(rows)


def _check_shapes(reference: mx.array, logits: mx.array) -> None:
    if reference.shape != logits.shape:
        raise MeasurementError(
            f"logits {logits.shape} and reference {reference.shape} must have one shape; "
            "score both models on the same windows"
        )


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _over_positions(
    row: Callable[[_Floats, _Floats], float] | None,
    lazy: Callable[[mx.array, mx.array], mx.array],
    reference: mx.array,
    logits: mx.array,
) -> mx.array:
    """Apply one of the two forms to all positions, in pieces; shape (number of positions,), evaluated."""
    vocab = reference.shape[-1]
    flat_reference, flat_logits = reference.reshape(-1, vocab), logits.reshape(-1, vocab)
    step = max(1, _PIECE_NUMEL // vocab)
    pieces = []
    for start in range(0, flat_reference.shape[0], step):
        a, b = flat_reference[start : start + step], flat_logits[start : start + step]
        if row is None:
            piece = lazy(a, b)
        else:
            rows = zip(_as_numpy(a), _as_numpy(b), strict=True)
            piece = mx.array(np.array([row(first, second) for first, second in rows], dtype=np.float32))
        mx.eval(piece)
        pieces.append(piece)
    return mx.concatenate(pieces) if pieces else mx.zeros((0,))


def _as_numpy(values: mx.array) -> _Floats:
    """A float32 view of evaluated memory where MLX's array is float32 already, else a copy."""
    return np.array(values.astype(mx.float32), copy=None)


def _kl_row(reference: _Floats, logits: _Floats) -> float:
    """KL of one position: float32 arrays, float64 scalars.

    With u = q's logits − p's logits, centred so that E_p[u] = 0, KL = log E_p[e^u] = log(1 + E_p[e^u − 1]):
    a quantity of second order in u from which no large normaliser has to be taken off.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scores = reference - reference.max()
        u = (logits - logits.max()) - scores
        p = np.exp(scores)
        total = float(p.sum(dtype=np.float64))
        u -= np.float32(float(np.dot(p, u)) / total)
        excess = float(np.dot(p, np.expm1(u))) / total
    if not excess < 1.0:  # far apart, masked or NaN: overflow is possible, cancellation is not
        return _kl_row_far(reference, logits)
    # What the float32 centring left of E_p[u] is taken off again.
    return max(math.log1p(excess) - float(np.dot(p, u)) / total, 0.0)


def _kl_row_far(reference: _Floats, logits: _Floats) -> float:
    """KL of one position in float64, straight from its definition; minus infinities allowed."""
    log_p, log_q = (_log_probs_float64(scores) for scores in (reference, logits))
    return float(np.dot(np.exp(log_p), log_p - log_q))


def _log_probs_float64(scores: _Floats) -> NDArray[np.float64]:
    shifted = scores.astype(np.float64) - float(scores.max())
    return cast(NDArray[np.float64], np.maximum(shifted - math.log(np.exp(shifted).sum()), _FLOOR))


def _same_top_row(reference: _Floats, logits: _Floats) -> float:
    return float(reference.argmax() == logits.argmax())


def _log_probs(scores: mx.array) -> mx.array:
    return mx.maximum(scores.astype(mx.float32) - _log_normaliser(scores), _FLOOR)


def _log_normaliser(scores: mx.array) -> mx.array:
    return mx.logsumexp(scores.astype(mx.float32), axis=-1, keepdims=True)
