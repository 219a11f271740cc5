"""Long windows: documents of all domains one behind the other, as the context of a long session holds them.

What a cache stores depends on how much stands before a token, so these windows are as long as the context
that is to be served, which single documents are not. Called for measuring and comparing KV caches.
"""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.measure.records import Record, Split, hash_records, read_records
from mlx_optiq_ext.measure.rendering import render_record
from mlx_optiq_ext.types.quant import CalibrationInfo

__all__ = ["Sessions", "load_sessions", "prefix_lengths"]

_LENGTHS = (256, 1024)


class Sessions(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Windows of several lengths from the same text."""

    windows: dict[int, NDArray[np.int32]]
    """By length T: token ids (W, T)."""
    info: CalibrationInfo


def load_sessions(
    tokenizer: Any,
    lengths: tuple[int, ...],
    *,
    num_tokens: int,
    source: str | None = None,
    split: Split,
    least: int = 1,
) -> Sessions:
    """Join documents, one per domain in turn, and cut the whole into windows of every length.

    Args:
        tokenizer: See :func:`~mlx_optiq_ext.measure.rendering.render_record`.
        lengths: Tokens per window.
        num_tokens: Tokens wanted per length.
        source: JSONL file of the user; None for the shipped text.
        split: Which shipped text.
        least: Windows wanted per length, however long they are; where the text is too short for that many
            side by side, they overlap, but for their last halves.
    Returns:
        Windows of those lengths that the text reaches; a note names the others.
    Raises:
        UsageError: The file is no calibration file.
    """
    records = _in_turns(read_records(source, split))
    joined = [token for record in records for token in render_record(tokenizer, record).tokens]
    stream = np.array(joined, dtype=np.int32)
    windows, missing = {}, []
    for length in lengths:
        apart = len(stream) // length
        if not apart:
            missing.append(length)
            continue
        overlapping = (len(stream) - length) // -(-length // 2) + 1
        wanted, there = max(least, num_tokens // length), max(apart, min(least, overlapping))
        # Spread over the whole text, so that few windows still see all of it.
        starts = np.linspace(0, len(stream) - length, min(wanted, there)).astype(int)
        windows[length] = np.stack([stream[start : start + length] for start in starts])
    notes: tuple[str, ...] = ()
    if missing:
        options = "--calibration" if split == "calibration" else "--held-out"
        notes = (
            f"the {split.replace('_', '-')} text has {len(stream)} tokens: no prefix of "
            f"{', '.join(map(str, missing))} was measured; give a longer text with {options}",
        )
    info = CalibrationInfo(
        source=f"built-in {split}" if source is None else source,
        sha256=hash_records(records),
        num_tokens=sum(int(w.size) for w in windows.values()),
        num_windows=sum(len(w) for w in windows.values()),
        domains=tuple(dict.fromkeys(record.domain for record in records)),
        notes=notes,
    )
    return Sessions(windows=windows, info=info)


def prefix_lengths(context: int) -> tuple[int, ...]:
    """Prefix lengths of ``--context``: 256 and 1,024 tokens where shorter, and the context itself."""
    return (*(length for length in _LENGTHS if length < context), context)


def _in_turns(records: tuple[Record, ...]) -> list[Record]:
    """The first document of every domain, then the second of every domain, …"""
    seen: dict[str, int] = {}
    numbered = []
    for order, record in enumerate(records):
        turn = seen[record.domain] = seen.get(record.domain, -1) + 1
        numbered.append((turn, order, record))
    return [record for _, _, record in sorted(numbered, key=lambda entry: entry[:2])]
