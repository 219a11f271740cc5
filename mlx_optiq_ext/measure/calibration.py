"""Text to token windows, with its source and hash recorded.

A window is ``T`` successive tokens of one document. Knows nothing of models beyond their tokenizer. Called by
everything that measures or scores.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.measure.records import Record, Split, hash_records, read_records
from mlx_optiq_ext.measure.rendering import FORM_NOTES, Rendered, render_record
from mlx_optiq_ext.types.quant import CalibrationInfo

__all__ = ["Windows", "load_windows"]


class Windows(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Calibration or held-out tokens; ``W`` windows of ``T`` tokens."""

    tokens: NDArray[np.int32]
    """Token ids, (W, T)."""
    domain_index: NDArray[np.int32]
    """Index into ``info.domains`` of every window, (W,)."""
    info: CalibrationInfo


class _Piece(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One window before it is chosen."""

    domain: str
    records: tuple[int, ...]
    """Indices of the records it was cut from: one, unless a whole domain had to be joined."""
    tokens: list[int]


def load_windows(
    tokenizer: Any, *, source: str | None = None, split: Split = "calibration", num_tokens: int, window: int
) -> Windows:
    """Cut calibration text into equal windows, spread evenly over its domains.

    No window crosses a document. A document shorter than ``window`` is skipped; only where a domain has none
    that is long enough are its documents joined, and a note says so. Windows come in turns: one per domain,
    within a domain one per document; a larger ``num_tokens`` begins with the windows of a smaller one.

    Args:
        tokenizer: See :func:`~mlx_optiq_ext.measure.rendering.render_record`.
        source: JSONL file of the user; None for the shipped text.
        split: Which shipped text.
        num_tokens: Tokens wanted in all; ``num_tokens // window`` windows are cut.
        window: Tokens per window, T.
    Returns:
        Windows, with fewer tokens than wanted (and a note) where the text is used up.
    Raises:
        UsageError: The file is no calibration file, or ``num_tokens`` is less than one window.
        MeasurementError: All text of a domain is shorter than one window.
    """
    wanted = num_tokens // window
    if wanted < 1:
        raise UsageError(
            f"{num_tokens} tokens are less than one window of {window}; raise --num-tokens or lower --window"
        )
    records = read_records(source, split)
    rendered = [render_record(tokenizer, record) for record in records]
    domains = tuple(dict.fromkeys(record.domain for record in records))
    notes = _form_notes(records, rendered)
    queues = [_cut_domain(domain, records, rendered, window, notes) for domain in domains]
    pieces = _take_in_turns(queues, wanted)
    notes += _count_notes(pieces, domains, wanted, window)
    used = tuple(domain for domain in domains if any(piece.domain == domain for piece in pieces))
    used_records = sorted({index for piece in pieces for index in piece.records})
    info = CalibrationInfo(
        source=f"built-in {split}" if source is None else Path(source).name,
        sha256=hash_records([records[index] for index in used_records]),
        num_tokens=len(pieces) * window,
        num_windows=len(pieces),
        domains=used,
        notes=tuple(notes),
    )
    return Windows(
        tokens=np.array([piece.tokens for piece in pieces], dtype=np.int32),
        domain_index=np.array([used.index(piece.domain) for piece in pieces], dtype=np.int32),
        info=info,
    )


def _cut_domain(
    domain: str, records: Sequence[Record], rendered: Sequence[Rendered], window: int, notes: list[str]
) -> list[_Piece]:
    """All windows of one domain: the first of every document, then the second of every document, …"""
    members = [index for index, record in enumerate(records) if record.domain == domain]
    documents: list[tuple[tuple[int, ...], list[int]]] = [
        ((index,), rendered[index].tokens) for index in members
    ]
    long_enough = [(indices, tokens) for indices, tokens in documents if len(tokens) >= window]
    if not long_enough:
        joined = [token for _, tokens in documents for token in tokens]
        if len(joined) < window:
            raise MeasurementError(
                f"domain {domain!r} has {len(joined)} tokens, less than one window of {window}; "
                "add text to it or use a smaller window"
            )
        if len(documents) > 1:
            notes.append(f"{domain}: no document has {window} tokens, so {len(documents)} were joined")
        long_enough = [(tuple(members), joined)]
    numbered = [
        (start, order, _Piece(domain=domain, records=indices, tokens=tokens[start : start + window]))
        for order, (indices, tokens) in enumerate(long_enough)
        for start in range(0, len(tokens) - window + 1, window)
    ]
    return [piece for _, _, piece in sorted(numbered, key=lambda entry: entry[:2])]


def _take_in_turns(queues: Sequence[Sequence[_Piece]], wanted: int) -> list[_Piece]:
    """Up to ``wanted`` pieces, one of every queue in turn; an exhausted queue is passed over."""
    longest = max(len(queue) for queue in queues)
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return turns[:wanted]


def _form_notes(records: Sequence[Record], rendered: Sequence[Rendered]) -> list[str]:
    """One note per domain and form that is not the tokenizer's own."""
    counts = Counter((r.domain, done.form) for r, done in zip(records, rendered, strict=True))
    totals = Counter(record.domain for record in records)
    return [
        f"{domain}: {count} of {totals[domain]} records: {FORM_NOTES[form]}"
        for (domain, form), count in counts.items()
        if form in FORM_NOTES
    ]


def _count_notes(pieces: Sequence[_Piece], domains: Sequence[str], wanted: int, window: int) -> list[str]:
    """Say where fewer windows were found than asked for, or spread unevenly."""
    notes = []
    counts = Counter(piece.domain for piece in pieces)
    missing = [domain for domain in domains if not counts[domain]]
    if missing:
        notes.append(
            f"{wanted} windows do not reach {', '.join(missing)}; raise num_tokens to {len(domains) * window}"
        )
    if len(pieces) < wanted:
        notes.append(f"{wanted * window} tokens asked for, all {len(pieces) * window} available are used")
    most, least = max(counts.values()), min(counts.values())
    if most - least > 1:
        notes.append("uneven: " + ", ".join(f"{domain} {counts[domain]}" for domain in domains) + " windows")
    return notes
