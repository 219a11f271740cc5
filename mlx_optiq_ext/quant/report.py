"""Everything a report shows, gathered from the artefacts of a conversion; drawn elsewhere.

Takes the sensitivity table, the allocation and the score record, each of which may be absent. Knows
nothing of files, colours or MLX. Called by ``optiq report`` and at the end of a conversion.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from mlx_optiq_ext.quant.heat_map import build_heat_map
from mlx_optiq_ext.types.quant import Allocation, Choice, SensitivityTable
from mlx_optiq_ext.types.report import Curve, CurvePoint, Report, TextTable
from mlx_optiq_ext.types.score import ScoreReport, ScoreRow

__all__ = [
    "INTERVAL",
    "bits_table",
    "build_report",
    "comparison_table",
    "domains_table",
    "pins_table",
    "size_text",
]

INTERVAL = 1.96
"""Standard errors on each side of a predicted 95 % interval; measured ones carry their own half width."""


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
        facts=_facts(table, allocation),
        comparison=comparison_table(score) if score else None,
        domains=domains_table(score) if score else None,
        bits=bits_table(allocation, table) if allocation else None,
        pins=pins_table(allocation) if allocation and allocation.pins else None,
        curve=_curve(allocation, score, predicted),
        heat_map=build_heat_map(table, allocation),
        missing=tuple(missing),
        notes=(*(table.notes if table else ()), *(score.notes if score else ())),
    )


def comparison_table(score: ScoreReport) -> TextTable:
    """Reference, this model and uniform ones: size, divergence with its interval, agreement, perplexity."""
    first = next((i for i, row in enumerate(score.rows) if row.role == "candidate"), None)
    return TextTable(
        title=f"Held-out comparison with {score.reference}",
        columns=("model", "bits/weight", "size", "KL, nats/token", "KL ratio", "top-1", "perplexity"),
        rows=tuple(_score_cells(row, index == first) for index, row in enumerate(score.rows)),
        highlight=first,
        note=(
            f"{score.held_out.num_tokens} held-out tokens in {score.held_out.num_windows} windows, "
            f"{len(score.held_out.domains)} domains; ± is a 95 % interval; KL ratio: against this model."
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
        rows=tuple((d, *(_number(row.by_domain.get(d)) for row in rows)) for d in domains),
    )


def bits_table(allocation: Allocation, table: SensitivityTable | None = None) -> TextTable:
    """How many modules, and with a table how many weights and how much divergence, each choice got."""
    modules = Counter(allocation.bit_map.choices.values())
    columns: tuple[str, ...] = ("storage", "bits/weight", "modules")
    float_bits = table.float_bits if table else 16
    rows = [[c.label, f"{c.bpw(float_bits):g}", str(modules[c])] for c in sorted(modules)]
    if table is not None:
        columns += ("share of weights", "predicted KL")
        numel: defaultdict[Choice, int] = defaultdict(int)
        divergence: defaultdict[Choice, float] = defaultdict(float)
        predicted = {(p.path, p.choice): p.divergence for p in table.probes}
        for unit in table.units:
            choice = allocation.bit_map.choices.get(unit.path)
            if choice is not None:
                numel[choice] += unit.numel
                divergence[choice] += predicted.get((unit.path, choice), 0.0)
        for row, choice in zip(rows, sorted(modules), strict=True):
            row += [f"{100 * numel[choice] / table.total_numel:.1f} %", _number(divergence[choice])]
    return TextTable(title="Bits chosen", columns=columns, rows=tuple(tuple(row) for row in rows))


def pins_table(allocation: Allocation) -> TextTable:
    """Every forced choice with its reason and its cost."""
    return TextTable(
        title="Pins",
        columns=("path", "choice", "reason", "KL cost", "bytes more"),
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


def size_text(nbytes: int) -> str:
    """Bytes in decimal units: ``84.1 MB``, ``4.97 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"


def _facts(table: SensitivityTable | None, allocation: Allocation | None) -> tuple[tuple[str, str], ...]:
    facts: list[tuple[str, str]] = []
    if allocation is not None and allocation.nbytes:
        facts.append(("size of weights", size_text(allocation.nbytes)))
    if allocation is not None and allocation.achieved_bpw:
        facts += [
            (
                "stored bits per weight",
                f"{allocation.achieved_bpw:.3f} (ceiling {allocation.target_bpw:.3f})",
            ),
            (
                "predicted KL",
                _plus_minus(allocation.predicted_divergence, INTERVAL * allocation.predicted_stderr)
                + " nats/token",
            ),
        ]
    if table is not None:
        units = f"{len(table.units)} units in {_num_blocks(table)} blocks, {table.total_numel:,d} weights"
        facts.append(("model", f"{_source_name(table)} ({units})"))
        cost = f", {table.forward_equivalents:.3g} forward passes" if table.forward_equivalents else ""
        facts.append(("measured by", f"{table.method}, reference {table.reference}{cost}"))
        text = table.calibration
        facts.append(("calibration", f"{text.source}, {text.num_tokens} tokens, sha256 {text.sha256[:12]}"))
    correction = allocation.correction if allocation else table.correction if table else None
    if correction is not None:
        facts.append(("correction", correction))
    return tuple(facts)


def _source_name(table: SensitivityTable) -> str:
    """Repository id, or the last part of a folder's path."""
    source = table.model.source.rstrip("/")
    is_path = source.count("/") != 1 or source.startswith((".", "/", "~"))
    return (source.rpartition("/")[2] if is_path else source) or table.model.model_type


def _num_blocks(table: SensitivityTable) -> int:
    return len({unit.block for unit in table.units if unit.block is not None})


def _curve(
    allocation: Allocation | None, score: ScoreReport | None, predicted: Sequence[CurvePoint]
) -> Curve | None:
    chosen = None
    uniform: tuple[CurvePoint, ...] = ()
    if allocation is not None:
        chosen = CurvePoint(
            label="chosen",
            bpw=allocation.achieved_bpw,
            divergence=allocation.predicted_divergence,
            half_width=INTERVAL * allocation.predicted_stderr,
        )
        uniform = tuple(CurvePoint(label=n, bpw=b, divergence=d) for n, b, d in allocation.uniform if d > 0)
    rows = score.rows if score else ()
    curve = Curve(
        predicted=tuple(point for point in predicted if point.divergence > 0),
        chosen=chosen if chosen and chosen.divergence > 0 else None,
        uniform=uniform,
        measured=tuple(_point(row) for row in rows if row.role == "candidate" and row.divergence > 0),
        measured_uniform=tuple(_point(row) for row in rows if row.role == "uniform" and row.divergence > 0),
    )
    return curve if curve != Curve() else None


def _point(row: ScoreRow) -> CurvePoint:
    label = row.label.removeprefix("uniform ")
    return CurvePoint(
        label=label, bpw=row.bpw, divergence=row.divergence, half_width=row.divergence_half_width
    )


def _score_cells(row: ScoreRow, is_first: bool) -> tuple[str, ...]:
    bpw, nbytes, perplexity = (
        f"{row.bpw:.3f}",
        size_text(row.nbytes),
        _plus_minus(row.perplexity, row.perplexity_half_width),
    )
    if row.role == "reference":
        return row.label, bpw, nbytes, "0", "", "100 %", perplexity
    ratio = "1" if is_first else ""
    if row.against_first is not None:
        ratio = f"{row.against_first:.2f}"
        if row.against_first_interval is not None:
            ratio += " ({:.2f}–{:.2f})".format(*row.against_first_interval)
    top1 = _plus_minus(100 * row.top1, 100 * row.top1_half_width) + " %"
    return (
        row.label,
        bpw,
        nbytes,
        _plus_minus(row.divergence, row.divergence_half_width),
        ratio,
        top1,
        perplexity,
    )


def _plus_minus(value: float, half: float) -> str:
    """Value and half width of its 95 % interval, with as many digits as the interval has meaning."""
    if not half > 0:
        return _number(value)
    digits = max(0, 1 - _exponent(half))
    return f"{value:.{digits}f} ± {half:.{digits}f}" if digits <= 6 else f"{value:.2e} ± {half:.1e}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"
