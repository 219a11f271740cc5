"""Compared KV caches as tables for people.

Knows neither MLX nor files. Called by ``optiq score --kv-config``.
"""

from collections.abc import Sequence

from mlx_optiq_ext.types.figures import FEWEST_WINDOWS, divergence_text, interval_text
from mlx_optiq_ext.types.kv import KVScoreReport, KVScoreRow, NeedleCell
from mlx_optiq_ext.types.report import TextTable

__all__ = ["cache_tables", "needle_tables"]


def cache_tables(report: KVScoreReport) -> tuple[TextTable, ...]:
    """Per model what every cache does to the output at every length, then what every cache takes."""
    tables = []
    for model in dict.fromkeys(row.model for row in report.rows):
        rows = [row for row in report.rows if row.model == model]
        tables += [_loss_table(report, model, rows), _memory_table(model, rows)]
    return tuple(tables)


def _loss_table(report: KVScoreReport, model: str, rows: Sequence[KVScoreRow]) -> TextTable:
    count = min(row.num_windows for row in rows)
    few = "" if count >= FEWEST_WINDOWS else f", n/a with fewer than {FEWEST_WINDOWS}"
    return TextTable(
        title=f"KV caches of {model} against the full-precision cache of {report.reference}",
        columns=("cache", "tokens", "bits", "KL, nats/token", "top-1", "perplexity"),
        rows=tuple(
            (
                row.cache,
                f"{row.length:,}",
                f"{row.bits_per_number:.3f}",
                divergence_text(row.divergence, row.divergence_half_width, row.num_windows),
                f"{row.top1:.1%}",
                interval_text(row.perplexity, row.perplexity_half_width, row.num_windows),
            )
            for row in rows
        ),
        note=f"{report.held_out.num_windows} windows of {report.held_out.source}; compared at the last half "
        f"of a window, at most 256 tokens; ± is a 95 % interval over windows{few}.",
    )


def _memory_table(model: str, rows: Sequence[KVScoreRow]) -> TextTable:
    return TextTable(
        title=f"Bytes per token of the KV caches of {model}",
        columns=("cache", "tokens", "predicted", "held"),
        rows=tuple(
            (
                row.cache,
                f"{row.length:,}",
                f"{row.bytes_per_token:,.0f}",
                f"{row.held_bytes_per_token:,.0f}",
            )
            for row in rows
        ),
        note="predicted: for 16-bit inference; held: by the buffers of this run, in its own precision, with "
        "room to grow.",
    )


def needle_tables(cells: Sequence[NeedleCell]) -> tuple[TextTable, ...]:
    """Per model and cache a grid, depth × length."""
    tables = []
    for model, cache in dict.fromkeys((cell.model, cell.cache) for cell in cells):
        mine = [cell for cell in cells if (cell.model, cell.cache) == (model, cache)]
        lengths = tuple(dict.fromkeys(cell.length for cell in mine))
        by_place = {(cell.depth, cell.length): cell for cell in mine}
        tables.append(
            TextTable(
                title=f"Hidden facts: {model}, {cache}",
                columns=("depth", *(f"{length:,} tokens" for length in lengths)),
                rows=tuple(
                    (f"{depth:.0%}", *(_needle(by_place.get((depth, length))) for length in lengths))
                    for depth in dict.fromkeys(cell.depth for cell in mine)
                ),
                note="answer tokens ranked first, full precision → this cache (change of the answer's log "
                "probability, nats).",
            )
        )
    return tuple(tables)


def _needle(cell: NeedleCell | None) -> str:
    if cell is None:
        return "–"
    return f"{cell.full_found:.0%} → {cell.found:.0%} ({cell.log_probability_change:+.2f})"
