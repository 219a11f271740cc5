"""Weight errors of every choice of one tensor, a few rows at a time, and what they cost.

Joins the correction (which error a choice makes) with the statistics (what that error costs). Called by
``sensitivity``; knows nothing of blocks or files.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.measure.head import HeadStatistics
from mlx_optiq_ext.measure.statistics import UnitStatistics
from mlx_optiq_ext.quant.correct import Level, gram_error, pack, unpack
from mlx_optiq_ext.types.quant import Choice

__all__ = ["Costs", "choice_errors", "divergence_of_choices", "divergence_of_head_choices"]

_CHUNK_WEIGHTS = 1 << 25
_SAMPLED_ROWS = 128
_FULL_AND_FAST: tuple[Level, Level] = ("full", "fast")
Floats = npt.NDArray[np.float64]


class Costs(NamedTuple):
    """What the choices of one tensor cost."""

    divergence: Floats
    """(C, W)."""
    gain: Floats
    """(C,) what the fast rounding's divergence was multiplied by to stand for the full one; 1 elsewhere."""


def choice_errors(
    weight: mx.array,
    choices: Sequence[Choice],
    *,
    level: Level,
    float_dtype: mx.Dtype,
    importance: mx.array | None,
) -> Iterator[tuple[int, list[mx.array]]]:
    """Yield (first row, [error of each choice]) over chunks of rows; errors are float32, evaluated.

    Rows (experts of a stack) are quantized independently, so chunks change nothing. The full correction is
    rounded fast here; what it gains beyond is a factor on the cost (:class:`Costs`).

    Args:
        weight: (O, I) or (E, O, I).
        choices: None of them keep.
        level: Correction.
        float_dtype: Stored type of scales and biases; also what the weight is cast to first.
        importance: (I,) or (E, I).
    """
    rounded: Level = "fast" if level == "full" else level
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
            packed = pack(rows, choice, level=rounded, float_dtype=float_dtype, importance=own)
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
) -> Costs:
    """Estimated divergence of one tensor at every choice; keep costs nothing."""
    stored = [c for c in choices if c.mode != "keep"]
    if not stored:
        return Costs(np.zeros((len(choices), 1)), np.ones(len(choices)))
    importance = statistics.importance() if level != "none" else None
    pieces = [
        statistics.divergence(start, errors)
        for start, errors in choice_errors(
            weight, stored, level=level, float_dtype=float_dtype, importance=importance
        )
    ]
    costs = np.sum(pieces, axis=0)
    gain = np.ones(len(stored))
    if level == "full":
        gain = _gain_of_full(weight, statistics, stored, float_dtype)
    return _with_keep(costs * gain[:, None], gain, stored, choices)


def _with_keep(costs: Floats, gain: Floats, stored: Sequence[Choice], choices: Sequence[Choice]) -> Costs:
    """Costs of all choices from those of the stored ones."""
    result = Costs(np.zeros((len(choices), costs.shape[1])), np.ones(len(choices)))
    places = [choices.index(c) for c in stored]
    result.divergence[places] = costs
    result.gain[places] = gain
    return result


def _gain_of_full(
    weight: mx.array,
    statistics: UnitStatistics | HeadStatistics,
    choices: Sequence[Choice],
    float_dtype: mx.Dtype,
) -> Floats:
    """Output error of the full correction over that of the fast one, (C,), at most 1.

    The diagonal Fisher cannot see what error feedback gains (it trades error between columns), so the
    estimate of the fast rounding is scaled by the ratio of Tr(E G Eᵀ) on a sample of rows, which can. It is
    taken at the affine choice nearest 4 bits and holds for affine choices, the only ones that the writer
    corrects fully; 1 for all where it has no Gram. Rounded with the Gram of half of the windows, and judged
    under that of the other half; a single window is judged on itself.
    """
    gains = np.ones(len(choices))
    affine = [c for c in choices if c.mode == "affine"]
    if not affine:
        return gains
    choice = min(affine, key=lambda c: (abs(c.bits - 4), c))
    wanted = _SAMPLED_ROWS if weight.ndim == 2 else max(1, _SAMPLED_ROWS // weight.shape[1])
    step = max(1, weight.shape[0] // wanted)
    rows = weight[::step]
    experts = range(0, weight.shape[0], step) if weight.ndim == 3 else None
    known, held_back = (statistics.gram(experts, half=half) for half in (0, 1))
    if known is None or held_back is None:
        return gains
    full, fast = (
        float(
            gram_error(
                rows,
                pack(rows, choice, level=level, float_dtype=float_dtype, gram=known),
                choice,
                held_back,
            )
        )
        for level in _FULL_AND_FAST
    )
    gains[[c.mode == "affine" for c in choices]] = min(1.0, full / fast) if fast > 0 else 1.0
    return gains


def divergence_of_head_choices(
    weight: mx.array,
    head: HeadStatistics,
    lookups: UnitStatistics | None,
    choices: Sequence[Choice],
    *,
    level: Level,
    float_dtype: mx.Dtype,
) -> Costs:
    """Divergence of the head at every choice: exact on the logits, plus lookups of a tied table."""
    stored = [c for c in choices if c.mode != "keep"]
    importance = head.importance() if level != "none" else None
    changes: list[list[list[mx.array]]] = [[] for _ in stored]
    costs: Floats = np.zeros((len(stored), 1))
    for start, errors in choice_errors(
        weight, stored, level=level, float_dtype=float_dtype, importance=importance
    ):
        for c, error in enumerate(errors):
            changes[c].append(head.logit_change(error))
        if lookups is not None:
            costs = costs + lookups.divergence(start, errors)
    joined = [
        [mx.concatenate(list(parts), axis=-1) for parts in zip(*chunks, strict=True)] for chunks in changes
    ]
    on_logits = head.divergence(joined)
    fast = costs + on_logits
    gain = _gain_of_full(weight, head, stored, float_dtype) if level == "full" else np.ones(len(stored))
    costs = costs + gain[:, None] * on_logits
    before, after = fast.mean(axis=1), costs.mean(axis=1)
    gain = np.divide(after, before, out=np.ones_like(after), where=before > 0)
    return _with_keep(costs, gain, stored, choices)
