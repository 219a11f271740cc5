"""The facts a report begins with: size, bits, measured and predicted divergence, model, method.

Called by ``quant.report``.
"""

from mlx_optiq_ext.allocate.prediction import prediction_text
from mlx_optiq_ext.types.figures import plus_minus, size_text
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["report_facts"]


def report_facts(
    table: SensitivityTable | None, allocation: Allocation | None, score: ScoreReport | None
) -> tuple[tuple[str, str], ...]:
    """Say what is known, in order of importance.

    Args:
        table: Gives model, method, calibration and how far to trust the prediction.
        allocation: Gives bits, bytes and the prediction.
        score: Gives the measured divergence: that of its first candidate.
    Returns:
        Names and values.
    """
    facts: list[tuple[str, str]] = []
    if allocation is not None and allocation.nbytes:
        facts.append(("size of weights", size_text(allocation.nbytes)))
    if allocation is not None and allocation.achieved_bpw:
        bits = f"{allocation.achieved_bpw:.3f} (ceiling {allocation.target_bpw:.3f})"
        facts.append(("stored bits per weight", bits))
        if allocation.budget and not allocation.budget.startswith("--target-bpw"):
            facts.append(("budget", allocation.budget))
    own = next((row for row in score.rows if row.role == "candidate"), None) if score else None
    if score is not None and own is not None:
        value = plus_minus(own.divergence, own.divergence_half_width)
        facts.append(("measured KL", f"{value} nats/token on {score.held_out.num_tokens} held-out tokens"))
    if allocation is not None and allocation.achieved_bpw:
        if table is not None and table.method == "static":
            facts.append(("predicted KL", "none: the static method ranks tensors by shape"))
        else:
            facts.append(("predicted KL", prediction_text(allocation.predicted_divergence, table)))
    if table is not None:
        facts += _table_facts(table)
    correction = allocation.correction if allocation else table.correction if table else None
    if correction is not None:
        facts.append(("correction", correction))
    return tuple(facts)


def _table_facts(table: SensitivityTable) -> list[tuple[str, str]]:
    units = f"{len(table.units)} units in {_num_blocks(table)} blocks, {table.total_numel:,d} weights"
    facts = [("model", f"{_source_name(table)} ({units})")]
    if table.model.origin:
        facts.append(("reference weights", table.model.origin))
    cost = f", {table.forward_equivalents:.3g} forward passes" if table.forward_equivalents else ""
    facts.append(("measured by", f"{table.method}, reference {table.reference}{cost}"))
    text = table.calibration
    facts.append(("calibration", f"{text.source}, {text.num_tokens} tokens, sha256 {text.sha256[:12]}"))
    return facts


def _source_name(table: SensitivityTable) -> str:
    """Repository id, or the last part of a folder's path."""
    source = table.model.source.rstrip("/")
    is_path = source.count("/") != 1 or source.startswith((".", "/", "~"))
    return (source.rpartition("/")[2] if is_path else source) or table.model.model_type


def _num_blocks(table: SensitivityTable) -> int:
    return len({unit.block for unit in table.units if unit.block is not None})
