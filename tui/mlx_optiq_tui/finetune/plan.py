"""What a training would do, as ``optiq lora train --dry-run --json`` tells it, and the command itself.

Knows command lines and their results, no process and no widget.
"""

from collections.abc import Sequence

import msgspec
from rich.text import Text

from mlx_optiq_ext.types.training import RenderedSample, TrainPreview
from mlx_optiq_tui.widgets.rank_map import rank_map

__all__ = ["Planned", "PlannedRanks", "plan_text", "samples_text", "train_words"]


class PlannedRanks(msgspec.Struct, frozen=True, kw_only=True):
    """Of the rank map, what is shown."""

    ranks: dict[str, int]
    scaling: str
    rank: int


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a dry run."""

    adapter: str
    ranks: PlannedRanks
    preview: TrainPreview
    notes: tuple[str, ...] = ()


def train_words(
    model: str, data: str, out: str, flags: Sequence[str], *, dry_run: bool = False
) -> tuple[str, ...]:
    """``optiq lora train``; a stopped one goes on.

    Args:
        model: Base, folder or Hub id.
        data: Folder, JSONL file or Hub id.
        out: Folder of the adapter.
        flags: Options, from a form.
        dry_run: Check and count only.
    """
    return ("lora", "train", model, "--data", data, "-o", out, *flags, *(("--dry-run",) if dry_run else ()))


def plan_text(planned: Planned, width: int) -> Text:
    """Counts, ranks as a map, notes."""
    preview, ranks = planned.preview, planned.ranks
    text = Text(overflow="fold")
    parts = (("train", preview.train), ("valid", preview.valid), ("test", preview.test))
    said = [f"{name} {part.examples:,} ({part.tokens:,} tokens)" for name, part in parts if part.examples]
    text.append("examples ", "dim").append(", ".join(said))
    text.append(f", longest {max(part.longest for _, part in parts):,}\n")
    text.append("updates ", "dim").append(f"{preview.updates:,}", "bold")
    text.append(f", {preview.updates_per_epoch:,} an epoch")
    if preview.done_updates:
        text.append(f", {preview.done_updates:,} of them done")
    text.append("   parameters ", "dim").append(f"{preview.num_parameters:,}", "bold")
    text.append("   ranks ", "dim").append(f"{ranks.scaling} at {ranks.rank}\n")
    text.append(rank_map(ranks.ranks, width))
    for note in planned.notes:
        text.append(f"\nnote: {note}", "dim")
    return text


def samples_text(samples: Sequence[RenderedSample]) -> Text:
    """Examples as the model reads them; what is learnt is bold and underlined."""
    text = Text(overflow="fold")
    for sample in samples:
        text.append(f"{sample.where}, as the model reads it (what is learnt is underlined)\n", "dim")
        for piece in sample.pieces:
            text.append(piece.text, "bold underline" if piece.is_learnt else "")
        text.append("\n\n")
    return text
