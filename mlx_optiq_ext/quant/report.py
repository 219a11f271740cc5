"""Everything a report shows, gathered from the artefacts of a conversion; drawn elsewhere.

Takes the sensitivity table, the allocation and the score record, each of which may be absent. Knows
nothing of files, colours or MLX. Called by ``optiq report`` and at the end of a conversion.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from mlx_optiq_ext.allocate.heat_map import build_heat_map
from mlx_optiq_ext.allocate.prediction import predicted_as
from mlx_optiq_ext.quant.report_facts import report_facts
from mlx_optiq_ext.types.figures import number_text, plus_minus, size_text
from mlx_optiq_ext.types.quant import Allocation, Choice, SensitivityTable
from mlx_optiq_ext.types.report import Curve, CurvePoint, Report, TextTable
from mlx_optiq_ext.types.score import ScoreReport, ScoreRow

__all__ = [
    "bits_table",
    "build_report",
    "comparison_table",
    "domains_table",
    "pins_table",
]


def build_report(
    title: str,
    *,
    table: SensitivityTable | None = None,
    allocation: Allocation | None = None,
    score: ScoreReport | None = None,
    predicted: Sequence[CurvePoint] = (),
    missing: Sequence[str] = (),
) -> Report:
    """Gather what can be shown from what is there.

    Args:
        title: Name of the model the report is about.
        table: Measured sensitivities.
        allocation: The chosen bit map.
        score: Comparison on held-out text.
        predicted: Best allocations over a range of budgets, ascending in bpw.
        missing: Sentences about parts that are absent, shown as they are.
    """
    return Report(
        title=title,
        facts=report_facts(table, allocation, score),
        comparison=comparison_table(score) if score else None,
        domains=domains_table(score) if score else None,
        bits=bits_table(allocation, table) if allocation else None,
        pins=pins_table(allocation) if allocation and allocation.pins else None,
        curve=_curve(table, allocation, score, predicted),
        heat_map=build_heat_map(table, allocation),
        missing=tuple(missing),
        notes=_notes(table, score),
    )


def comparison_table(score: ScoreReport) -> TextTable:
    """Reference, this model and uniform ones: size, divergence with its interval, agreement, perplexity."""
    first = next((i for i, row in enumerate(score.rows) if row.role == "candidate"), None)
    uniform = "; uniform: plain rounding, as stock mlx-lm writes it"
    return TextTable(
        title=f"Held-out comparison with {score.reference}",
        columns=("model", "bits/weight", "size", "KL, nats/token", "KL ratio", "top-1", "perplexity"),
        rows=tuple(_score_cells(row, index == first) for index, row in enumerate(score.rows)),
        highlight=first,
        note=(
            f"{score.held_out.num_tokens} held-out tokens in {score.held_out.num_windows} windows, "
            f"{len(score.held_out.domains)} domains; ± is a 95 % interval; KL ratio: against this model"
            f"{uniform if any(row.role == 'uniform' for row in score.rows) else ''}."
        ),
    )


def domains_table(score: ScoreReport) -> TextTable | None:
    """Divergence per domain of every row but the reference; None where it was not recorded."""
    rows = [row for row in score.rows if row.role != "reference" and row.by_domain]
    if not rows:
        return None
    domains = list(dict.fromkeys(domain for row in rows for domain in row.by_domain))
    return TextTable(
        title="Divergence by domain, nats/token",
        columns=("domain", *(row.label for row in rows)),
        rows=tuple((d, *(number_text(row.by_domain.get(d)) for row in rows)) for d in domains),
    )


def bits_table(allocation: Allocation, table: SensitivityTable | None = None) -> TextTable:
    """How many modules, and with a table how many weights and how much divergence, each choice got."""
    modules = Counter(allocation.bit_map.choices.values())
    columns: tuple[str, ...] = ("storage", "bits/weight", "modules")
    float_bits = table.float_bits if table else 16
    rows = [[c.label, f"{c.bpw(float_bits):g}", str(modules[c])] for c in sorted(modules)]
    note = ""
    if table is not None:
        is_predicted = table.method != "static"
        columns += ("share of weights", "predicted KL") if is_predicted else ("share of weights",)
        if is_predicted:
            note = f"KL {predicted_as(table.correction)}: raw sums over single tensors."
        numel: defaultdict[Choice, int] = defaultdict(int)
        divergence: defaultdict[Choice, float] = defaultdict(float)
        predicted = {(p.path, p.choice): p.divergence for p in table.probes}
        for unit in table.units:
            choice = allocation.bit_map.choices.get(unit.path)
            if choice is not None:
                numel[choice] += unit.numel
                divergence[choice] += predicted.get((unit.path, choice), 0.0)
        for row, choice in zip(rows, sorted(modules), strict=True):
            row.append(f"{100 * numel[choice] / table.total_numel:.1f} %")
            row += [number_text(divergence[choice])] if is_predicted else []
    return TextTable(title="Bits chosen", columns=columns, rows=tuple(tuple(row) for row in rows), note=note)


def pins_table(allocation: Allocation) -> TextTable:
    """Every forced choice with its reason and its cost."""
    return TextTable(
        title="Pins",
        columns=("path", "choice", "reason", "predicted KL cost", "bytes more"),
        rows=tuple(
            (
                pin.path,
                pin.choice.label,
                pin.reason,
                f"{pin.cost_divergence:+.2g}",
                f"{pin.cost_bits // 8:+,d}",
            )
            for pin in allocation.pins
        ),
    )


def _notes(table: SensitivityTable | None, score: ScoreReport | None) -> tuple[str, ...]:
    """Notes of both, each once, and none that the facts say already."""
    notes = (*(table.notes if table else ()), *(score.notes if score else ()))
    said = {f"reference {table.model.origin}"} if table else set()
    return tuple(note for note in dict.fromkeys(notes) if note not in said)


def _curve(
    table: SensitivityTable | None,
    allocation: Allocation | None,
    score: ScoreReport | None,
    predicted: Sequence[CurvePoint],
) -> Curve | None:
    """Predicted and measured points; a uniform choice that was measured is not shown as predicted too."""
    rows = [row for row in score.rows if row.divergence > 0] if score else []
    measured_uniform = tuple(_point(row) for row in rows if row.role == "uniform")
    measured = tuple(_point(row) for row in rows if row.role == "candidate")
    named = {point.label for point in measured_uniform}
    chosen: CurvePoint | None = None
    uniform: tuple[CurvePoint, ...] = ()
    if table is not None and table.method == "static":
        allocation, predicted = None, ()
    if allocation is not None:
        chosen = CurvePoint(
            label="chosen", bpw=allocation.achieved_bpw, divergence=allocation.predicted_divergence
        )
        uniform = tuple(
            CurvePoint(label=label, bpw=bpw, divergence=divergence)
            for label, bpw, divergence in allocation.uniform
            if divergence > 0 and label not in named
        )
    points = tuple(point for point in predicted if point.divergence > 0)
    chosen = chosen if chosen and chosen.divergence > 0 else None
    if not (points or chosen or uniform or measured or measured_uniform):
        return None
    source = table or allocation
    return Curve(
        predicted=points,
        chosen=chosen,
        uniform=uniform,
        measured=measured,
        measured_uniform=measured_uniform,
        predicted_as=predicted_as(source.correction) if source else "predicted",
        note=_curve_note(table) if points or chosen or uniform else "",
    )


def _curve_note(table: SensitivityTable | None) -> str:
    check = table.probe_check if table else None
    probed = f" (exact probes: ×{check.ratio:.2f})" if check else ""
    return f"Predictions are raw estimates on calibration text{probed}."


def _point(row: ScoreRow) -> CurvePoint:
    label = row.label.removeprefix("uniform ")
    return CurvePoint(
        label=label, bpw=row.bpw, divergence=row.divergence, half_width=row.divergence_half_width
    )


def _score_cells(row: ScoreRow, is_first: bool) -> tuple[str, ...]:
    bpw, nbytes, perplexity = (
        f"{row.bpw:.3f}",
        size_text(row.nbytes),
        plus_minus(row.perplexity, row.perplexity_half_width),
    )
    if row.role == "reference":
        return row.label, bpw, nbytes, "0", "", "100 %", perplexity
    ratio = "1" if is_first else ""
    if row.against_first is not None:
        ratio = f"{row.against_first:.2f}"
        if row.against_first_interval is not None:
            ratio += " ({:.2f}–{:.2f})".format(*row.against_first_interval)
    top1 = plus_minus(100 * row.top1, 100 * row.top1_half_width) + " %"
    return (
        row.label,
        bpw,
        nbytes,
        plus_minus(row.divergence, row.divergence_half_width),
        ratio,
        top1,
        perplexity,
    )
