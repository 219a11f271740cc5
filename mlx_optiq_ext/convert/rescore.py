"""Make a later score a checkpoint's own: its score record, its metadata and its model card say the same.

Called by ``optiq score`` when it writes the score record of a folder that ``optiq convert`` made.
"""

from pathlib import Path

from msgspec.structs import replace

from mlx_optiq_ext.convert.describe import card_text, read_card
from mlx_optiq_ext.convert.scoring import measured_divergence, score_notes
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.metadata import find_metadata, read_metadata, write_metadata
from mlx_optiq_ext.formats.score import encode_score, read_score
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_ext.types.score import SCORE_FILE, ScoreReport

__all__ = ["is_own_record", "record_score"]


def is_own_record(file: Path, folder: Path) -> bool:
    """Whether ``file`` is the score record of ``folder``, and this package made the folder."""
    if file.absolute().resolve() != (folder / SCORE_FILE).resolve() or find_metadata(folder) is None:
        return False
    return isinstance(read_metadata(folder), CheckpointMetadata)


def record_score(folder: Path, report: ScoreReport) -> tuple[str, ...]:
    """Write the score record of a checkpoint, and bring its metadata and its model card up to date.

    A card that somebody has edited is left as it is.

    Args:
        folder: A checkpoint for which :func:`is_own_record` holds.
        report: Its first candidate is this checkpoint.
    Returns:
        Notes for people: what was changed, and what stands out in the score.
    Raises:
        UsageError: A file of the folder cannot be understood.
        ResourceError: The disk is full.
    """
    old = read_metadata(folder)
    assert isinstance(old, CheckpointMetadata)
    file = folder / SCORE_FILE
    before = read_score(file) if file.is_file() else None
    table = _table(folder)
    found = _notes(report, old)
    stale = _notes(before, old) if before else ()
    kept = [note for note in old.notes if note not in stale and not note.startswith("not scored")]
    new = replace(old, measured=measured_divergence(report), notes=tuple(dict.fromkeys((*kept, *found))))
    card = read_card(folder)
    name = next((line[2:] for line in card.splitlines() if line.startswith("# ")), folder.resolve().name)
    fresh = card_text(folder, name, card, new, table, report)
    # A run that was stopped in between has left the new card beside the old record.
    is_ours = card in ("", fresh, card_text(folder, name, card, old, table, before))
    if is_ours:
        write_bytes_atomic(folder / "README.md", fresh.encode())
    write_metadata(folder, new)
    write_bytes_atomic(file, encode_score(report))
    if is_ours:
        return (*found, f"scores written to {file}, metadata and model card brought up to date")
    return (*found, f"scores written to {file} and metadata; README.md was edited and is left as it is")


def _notes(report: ScoreReport, metadata: CheckpointMetadata) -> tuple[str, ...]:
    return score_notes(report, metadata.allocation, has_prediction=metadata.method != "static")


def _table(folder: Path) -> SensitivityTable | None:
    file = folder / "optiq" / "sensitivity.json"
    return read_sensitivity(file) if file.is_file() else None
