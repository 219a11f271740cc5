"""Score a fresh conversion on held-out text, and say what the score means for it.

Called by ``convert.model`` with the complete, verified checkpoint.
"""

from pathlib import Path

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.eval.score import score
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.score import encode_score
from mlx_optiq_ext.types.metadata import MeasuredDivergence
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ScoreOptions
from mlx_optiq_ext.types.progress import ProgressSink
from mlx_optiq_ext.types.quant import Allocation
from mlx_optiq_ext.types.score import SCORE_FILE, ScoreReport

__all__ = ["measured_divergence", "score_conversion", "score_notes"]

_TRUSTED = (0.5, 2.0)
"""Measured over predicted divergence: beyond it the prediction is no guide."""


def score_conversion(
    ref: ModelRef,
    candidate: ModelRef,
    allocation: Allocation,
    progress: ProgressSink,
    *,
    trust_remote_code: bool,
    has_prediction: bool,
) -> tuple[ScoreReport | None, tuple[str, ...]]:
    """Compare with the reference and with uniform choices around the achieved bits; writes the record.

    Args:
        ref: The unquantized model.
        candidate: The written checkpoint; its source is the name to show.
        allocation: What was planned and predicted.
        progress: Stage ``score``.
        trust_remote_code: Run code of the checkpoint.
        has_prediction: False where the sensitivities are by shape and predict nothing.
    Returns:
        The report and notes on it; no report, and the reason as a note, where scoring fails.
    """
    nearest = sorted(
        (row for row in allocation.uniform if "g" in row[0]),
        key=lambda row: abs(row[1] - allocation.achieved_bpw),
    )[:2]
    uniform = ",".join(label for label, _, _ in sorted(nearest, key=lambda row: row[1]))
    wanted = ScoreOptions(uniform=uniform, trust_remote_code=trust_remote_code)
    try:
        report = score(ref, [candidate], wanted, progress, labels=[candidate.source])
        write_bytes_atomic(Path(candidate.path) / SCORE_FILE, encode_score(report))
    except OptiqError as error:  # the checkpoint is good without a score
        return None, (f"not scored: {error}",)
    return report, score_notes(report, allocation, has_prediction=has_prediction)


def measured_divergence(report: ScoreReport) -> MeasuredDivergence:
    """What metadata keeps of a score: the divergence of its first candidate."""
    row = next(row for row in report.rows if row.role == "candidate")
    return MeasuredDivergence(
        divergence=row.divergence,
        stderr=row.divergence_stderr,
        half_width=row.divergence_half_width,
        held_out=report.held_out,
    )


def score_notes(
    report: ScoreReport, allocation: Allocation, *, has_prediction: bool = True
) -> tuple[str, ...]:
    """Say what stands out: a prediction that is off, a uniform choice that is better for no more bits.

    Args:
        report: Its first candidate is the conversion.
        allocation: What was predicted.
        has_prediction: False where the sensitivities are by shape and predict nothing.
    """
    own = next(row for row in report.rows if row.role == "candidate")
    notes = []
    predicted = allocation.predicted_divergence
    if has_prediction and predicted > 0:
        ratio = own.divergence / predicted
        if not _TRUSTED[0] <= ratio <= _TRUSTED[1]:
            notes.append(
                f"measured {own.divergence:.3g} nats/token on held-out text, {ratio:.2g} times the predicted "
                f"{predicted:.3g}: trust the measured number"
            )
    for row in report.rows:
        interval = row.against_first_interval
        if row.role == "uniform" and interval and row.nbytes <= own.nbytes and interval[1] < 1:
            notes.append(
                f"warning: {row.label} is closer to the reference with no more bits ({row.bpw:.3f}, here "
                f"{own.bpw:.3f}): {row.against_first:.2f} of this divergence, 95 % interval "
                f"{interval[0]:.2f}–{interval[1]:.2f}; prefer it, or measure on more text (--num-tokens)"
            )
    return tuple(notes)
