"""Values of a comparison: how far checkpoints are from their reference on held-out text.

Made by ``eval``; stored beside a checkpoint as ``optiq/score.json``; drawn by the report and the model card.
"""

from typing import Literal

import msgspec

from mlx_optiq_ext.types.quant import CalibrationInfo

__all__ = ["SCORE_FILE", "ScoreReport", "ScoreRole", "ScoreRow"]

SCORE_FILE = "optiq/score.json"
"""Where a checkpoint keeps its :class:`ScoreReport`, relative to its folder."""

ScoreRole = Literal["reference", "candidate", "uniform"]


class ScoreRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on the held-out text."""

    label: str
    """What people read: ``this model``, ``uniform 4g64``, a folder name or repository id."""
    role: ScoreRole = "candidate"
    """The unquantized model, a checkpoint, or the reference quantized alike everywhere."""
    bpw: float
    """All stored bits over all weights, scales, biases and unquantized tensors included."""
    nbytes: int
    """Stored bytes of all weights."""
    divergence: float
    """KL(reference ‖ this), nats per token, mean over domains; 0 for the reference."""
    divergence_stderr: float = 0.0
    """Standard error of ``divergence``, from the spread of windows within their domain."""
    divergence_half_width: float = 0.0
    """Half of the 95 % interval of ``divergence`` (Student's t)."""
    top1: float
    """Share of positions whose most likely token is the reference's, 0 to 1."""
    top1_stderr: float = 0.0
    """Standard error of ``top1``."""
    top1_half_width: float = 0.0
    """Half of the 95 % interval of ``top1``."""
    perplexity: float
    """exp of the mean negative log likelihood of the text, per token."""
    perplexity_stderr: float = 0.0
    """Standard error of ``perplexity``, to first order."""
    perplexity_half_width: float = 0.0
    """Half of the 95 % interval of ``perplexity``, to first order."""
    by_domain: dict[str, float] = {}
    """``divergence`` per domain of the text."""
    against_first: float | None = None
    """``divergence`` over that of the first candidate row; None for that row and for the reference."""
    against_first_interval: tuple[float, float] | None = None
    """95 % interval of ``against_first``, paired over windows."""


class ScoreReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison as it is stored; the reference row comes first, then candidates, then uniform ones."""

    format_version: int = 1
    reference: str
    """Name of the reference model: repository id or folder name."""
    held_out: CalibrationInfo
    """The text that was scored; never overlaps the calibration text."""
    window: int = 0
    """Tokens per window."""
    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...] = ()
    code_version: str = ""
