"""Compared KV caches as tables for people.

Knows neither MLX nor files. Called by ``optiq score --kv-config``.
"""

from collections.abc import Sequence

from mlx_optiq_ext.types.kv import KVScoreReport, KVScoreRow, NeedleCell
from mlx_optiq_ext.types.report import TextTable

__all__ = ["cache_table", "needle_tables"]


def cache_table(report: KVScoreReport) -> TextTable:
    """Every model with every cache at every length."""
    return TextTable(
        title=f"KV caches against the full-precision cache of {report.reference}",
        columns=(
            "model", "cache", "tokens", "bits", "KL, nats/token", "top-1", "perplexity", "bytes/token", "held"
        ),
        rows=tuple(_cells(row) for row in report.rows),
        note=(
            f"{report.held_out.num_windows} windows of {report.held_out.source}; compared at the last half "
            "of a window, at most 256 tokens; ± is a 95 % interval over windows. bytes/token: predicted for "
            "16-bit inference; held: by the buffers of this run, in its own precision, with room to grow."
        ),
    )  # fmt: skip


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


def _cells(row: KVScoreRow) -> tuple[str, ...]:
    return (
        row.model,
        row.cache,
        f"{row.length:,}",
        f"{row.bits_per_number:.3f}",
        f"{row.divergence:.4f}{_half(row.divergence_half_width, row.num_windows, 4)}",
        f"{row.top1:.1%}",
        f"{row.perplexity:.2f}{_half(row.perplexity_half_width, row.num_windows, 2)}",
        f"{row.bytes_per_token:,.0f}",
        f"{row.held_bytes_per_token:,.0f}",
    )


def _half(half_width: float, num_windows: int, digits: int) -> str:
    return f" ± {half_width:.{digits}f}" if num_windows > 1 else ""


def _needle(cell: NeedleCell | None) -> str:
    if cell is None:
        return "–"
    return f"{cell.full_found:.0%} → {cell.found:.0%} ({cell.log_probability_change:+.2f})"
