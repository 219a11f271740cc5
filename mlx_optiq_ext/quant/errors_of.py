"""Weight errors of every choice of one tensor, a few rows at a time, and what they cost.

Joins the correction (which error a choice makes) with the statistics (what that error costs). Called by
``sensitivity``; knows nothing of blocks or files.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.measure.head import HeadStatistics
from mlx_optiq_ext.measure.statistics import UnitStatistics
from mlx_optiq_ext.quant.correct import Level, gram_error, pack, unpack
from mlx_optiq_ext.types.quant import Choice

__all__ = ["choice_errors", "divergence_of_choices", "divergence_of_head_choices"]

_CHUNK_WEIGHTS = 1 << 25
_SAMPLED_ROWS = 128
_FULL_AND_FAST: tuple[Level, Level] = ("full", "fast")
Floats = npt.NDArray[np.float64]


def choice_errors(
    weight: mx.array,
    choices: Sequence[Choice],
    *,
    level: Level,
    float_dtype: mx.Dtype,
    importance: mx.array | None,
) -> Iterator[tuple[int, list[mx.array]]]:
    """Yield (first row, [error of each choice]) over chunks of rows; errors are float32, evaluated.

    Rows (experts of a stack) are quantized independently, so chunks change nothing.

    Args:
        weight: (O, I) or (E, O, I).
        choices: None of them keep.
        level: Correction.
        float_dtype: Stored type of scales and biases; also what the weight is cast to first.
        importance: (I,) or (E, I).
    """
    per_row = weight.size // weight.shape[0]
    step = max(1, _CHUNK_WEIGHTS // max(per_row, 1))
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        exact = rows.astype(mx.float32)
        own = (
            importance[start : start + step]
            if importance is not None and importance.ndim == 2
            else importance
        )
        errors = []
        for choice in choices:
            packed = pack(rows, choice, level=level, float_dtype=float_dtype, importance=own)
            errors.append(unpack(packed, choice) - exact)
            mx.eval(errors[-1])
        yield start, errors


def divergence_of_choices(
    weight: mx.array,
    statistics: UnitStatistics,
    choices: Sequence[Choice],
    *,
    level: Level,
    float_dtype: mx.Dtype,
) -> Floats:
    """Estimated divergence (C, W) of one tensor at every choice; keep costs nothing."""
    stored = [c for c in choices if c.mode != "keep"]
    total = np.zeros((len(choices), 1))
    if not stored:
        return total
    importance = statistics.importance() if level != "none" else None
    pieces = [
        statistics.divergence(start, errors)
        for start, errors in choice_errors(
            weight,
            stored,
            level="fast" if level == "full" else level,
            float_dtype=float_dtype,
            importance=importance,
        )
    ]
    costs = np.sum(pieces, axis=0)
    if level == "full":
        costs = costs * _gain_of_full(weight, statistics, stored, float_dtype)
    result = np.zeros((len(choices), costs.shape[1]))
    result[[choices.index(c) for c in stored]] = costs
    return result


def _gain_of_full(
    weight: mx.array,
    statistics: UnitStatistics | HeadStatistics,
    choices: Sequence[Choice],
    float_dtype: mx.Dtype,
) -> float:
    """Output error of the full correction over that of the fast one, at the affine choice nearest 4 bits.

    The diagonal Fisher cannot see what error feedback gains (it trades error between columns), so the
    estimate of the fast rounding is scaled by the ratio of Tr(E G Eᵀ) on a sample of rows, which can.
    """
    affine = [c for c in choices if c.mode == "affine"]
    if not affine:
        return 1.0
    choice = min(affine, key=lambda c: (abs(c.bits - 4), c))
    wanted = _SAMPLED_ROWS if weight.ndim == 2 else max(1, _SAMPLED_ROWS // weight.shape[1])
    step = max(1, weight.shape[0] // wanted)
    rows = weight[::step]
    gram = statistics.gram()
    own = gram[::step] if gram.ndim == 3 else gram
    errors = [
        float(
            gram_error(rows, pack(rows, choice, level=level, float_dtype=float_dtype, gram=own), choice, own)
        )
        for level in _FULL_AND_FAST
    ]
    return errors[0] / errors[1] if errors[1] > 0 else 1.0


def divergence_of_head_choices(
    weight: mx.array,
    head: HeadStatistics,
    lookups: UnitStatistics | None,
    choices: Sequence[Choice],
    *,
    level: Level,
    float_dtype: mx.Dtype,
) -> Floats:
    """Divergence (C, W) of the head at every choice: exact on the logits, plus lookups of a tied table."""
    stored = [c for c in choices if c.mode != "keep"]
    importance = head.importance() if level != "none" else None
    changes: list[list[list[mx.array]]] = [[] for _ in stored]
    costs: Floats = np.zeros((len(stored), 1))
    for start, errors in choice_errors(
        weight,
        stored,
        level="fast" if level == "full" else level,
        float_dtype=float_dtype,
        importance=importance,
    ):
        for c, error in enumerate(errors):
            changes[c].append(head.logit_change(error))
        if lookups is not None:
            costs = costs + lookups.divergence(start, errors)
    joined = [
        [mx.concatenate(list(parts), axis=-1) for parts in zip(*chunks, strict=True)] for chunks in changes
    ]
    gain = _gain_of_full(weight, head, stored, float_dtype) if level == "full" else 1.0
    costs = costs + gain * head.divergence(joined)
    result = np.zeros((len(choices), costs.shape[1]))
    result[[choices.index(c) for c in stored]] = costs
    return result
