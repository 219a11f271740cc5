"""What the monitor draws of one snapshot, as text.

Pure functions; no widget and no clock. Colours help and never tell alone.
"""

from collections.abc import Iterable, Sequence

from rich.text import Text

from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.palette import bits_color, ramp_color
from mlx_optiq_ext.types.status import EngineStatus, LayerBytes, RowStatus
from mlx_optiq_tui.history import History
from mlx_optiq_tui.themes import Inks
from mlx_optiq_tui.widgets.marks import Part, columns, legend, share_bar, sparkline

__all__ = ["kv_picture", "memory_picture", "row_cells", "speed_picture", "totals_picture", "waiting_words"]

_FULL = 16
"""Stands for caches in full precision, as in ``types.palette``."""
_SPARK = 10
_MEMORY_COLORS = tuple(ramp_color(share) for share in (0.95, 0.72, 0.5, 0.3))


def speed_picture(status: EngineStatus, history: History, width: int, inks: Inks) -> Text:
    """Speed, time to the first token, batch and queue: one line each, number and series."""
    running = sum(row.state != "queued" for row in status.rows)
    waiting = len(status.rows) - running
    first = history.first_token_s
    lines = (
        ("decode", f"{status.decode_tokens_per_s:8.1f} tok/s", history.decode, 0.0),
        ("prefill", f"{status.prefill_tokens_per_s:8.1f} tok/s", history.prefill, 0.0),
        ("first token", f"{first[-1]:8.2f} s    " if first else f"{'–':>8} s    ", first, 0.0),
        ("batch", f"{running:3d} of {status.max_rows:3d} ", history.running, float(status.max_rows)),
    )
    text = Text(no_wrap=True, overflow="ellipsis")
    for label, value, series, most in lines:
        head = f"{label:<12}{value:<15}"
        text.append(f"{label:<12}", "dim")
        text.append(f"{value:<15}", "bold")
        text.append(sparkline(series, max(width - len(head), 0), most), inks.accent)
        text.append("\n")
    text.append(f"{'queue':<12}", "dim")
    text.append(f"{waiting:3d} of {status.queue_limit:3d}", "bold")
    text.append(f"   {waiting_words(status)}" if waiting else "")
    if status.restarts:
        text.append(f"   batch rebuilt {status.restarts} times", inks.bad)
    return text


def waiting_words(status: EngineStatus) -> str:
    """What those in the queue wait for: a model, behind others that do, a row, their prompt, memory."""
    queued = [row for row in status.rows if row.state == "queued"]
    loaded = {model.id for model in status.models if model.loaded}
    opening = [row.model for row in queued if row.model not in loaded]
    if opening:
        behind = len(queued) - len(opening)
        said = f"for {', '.join(dict.fromkeys(opening))} to be loaded"
        return f"{said}, {behind} behind" if behind else said
    if len(status.rows) - len(queued) >= status.max_rows:
        return "for a free row"
    return "for memory" if any(row.prompt_tokens for row in queued) else "being read"


def memory_picture(status: EngineStatus, width: int) -> Text:
    """Weights, KV caches, prefix cache and the rest against the budget."""
    cache = status.prefix_cache
    known = status.weights_nbytes + status.kv_nbytes + cache.nbytes
    parts = [
        _part("weights", status.weights_nbytes, 0),
        _part("KV", status.kv_nbytes, 1),
        _part("prefixes", cache.nbytes, 2),
        _part("other", max(status.memory_nbytes - known, 0), 3),
    ]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("memory ", "dim")
    text.append(
        f"{format_nbytes(status.memory_nbytes)} of {format_nbytes(status.memory_limit_nbytes)}"
        f", peak {format_nbytes(status.peak_memory_nbytes)}\n",
        "bold",
    )
    text.append(share_bar(parts, status.memory_limit_nbytes, width))
    text.append("\n")
    text.append(legend(parts))
    return text


def totals_picture(status: EngineStatus, inks: Inks) -> Text:
    """Prefix cache and counts since the start."""
    cache = status.prefix_cache
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("prefixes ", "dim")
    text.append(
        f"{cache.entries} held, {format_nbytes(cache.nbytes)} of {format_nbytes(cache.limit_nbytes)}; "
        f"hits {_share(cache.hits, cache.lookups)}, tokens reused "
        f"{_share(cache.reused_tokens, cache.looked_up_tokens)}"
    )
    if cache.disk_entries:
        text.append(f"; {cache.disk_entries} on disk, {format_nbytes(cache.disk_nbytes)}")
    ended = {reason: number for reason, number in status.requests_finished.items() if number}
    good = ("stop", "stop_sequence", "length", "tool_calls", "cancelled")
    text.append("\nrequests ", "dim")
    text.append(f"{status.requests_total}")
    for reason, number in sorted(ended.items()):
        text.append(f", {number} {reason}", "" if reason in good else inks.bad)
    text.append("\ntokens ", "dim")
    text.append(f"{status.prompt_tokens_total} in, {status.completion_tokens_total} out")
    return text


def kv_picture(layers: Sequence[LayerBytes], width: int, height: int) -> Text:
    """KV bytes of each layer as columns coloured by bits, in bands where they do not fit side by side."""
    if not layers:
        return Text("no request holds a cache now", "dim")
    cell = 3 if len(layers) * 3 <= width else 1
    per_band = max(width // cell, 1)
    bands = [layers[start : start + per_band] for start in range(0, len(layers), per_band)]
    most = max(layers, key=lambda layer: layer.nbytes)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("KV by layer ", "dim")
    text.append(f"{len(layers)} layers, at most {format_nbytes(most.nbytes)} (layer {most.name})\n")
    bars = max((height - 2) // len(bands) - 1, 1)
    for band in bands:
        shades = [bits_color(_bits(layer)) for layer in band]
        text.append(columns([layer.nbytes for layer in band], shades, bars, cell))
        text.append("\n")
        for layer, shade in zip(band, shades, strict=True):
            bits = _bits(layer)
            text.append(("F" if bits >= _FULL else str(bits)).ljust(cell), shade)
        text.append("\n")
    return text.append(_bits_legend(layers))


def row_cells(row: RowStatus, history: History) -> tuple[str, ...]:
    """A request as cells of a table."""
    series = history.rows.get(row.id, ())
    done = f"{row.prefilled_tokens}/{row.prompt_tokens}" if row.state == "prefill" else f"{row.prompt_tokens}"
    return (
        row.state,
        f"{row.tokens_per_s:.1f}",
        sparkline(series, _SPARK),
        "–" if row.first_token_s is None else f"{row.first_token_s:.2f} s",
        done,
        f"{row.cached_tokens}",
        f"{row.completion_tokens}",
        f"{row.age_s:.0f} s",
        row.adapter or "",
        row.model,
        row.session,
    )


def _part(label: str, nbytes: int, index: int) -> Part:
    return Part(label=label, value=nbytes, shown=format_nbytes(nbytes), color=_MEMORY_COLORS[index])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _bits(layer: LayerBytes) -> int:
    """Nominal bits of the wider of keys and values; what is stored with scales has a little more."""
    stored = [bits for bits in (layer.k_bits, layer.v_bits) if bits is not None]
    return int(max(stored)) if stored else _FULL


def _bits_legend(layers: Iterable[LayerBytes]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for bits in sorted({_bits(layer) for layer in layers}):
        text.append("█", bits_color(bits))
        text.append(" F full precision  " if bits >= _FULL else f" {bits} bits  ")
    return text
