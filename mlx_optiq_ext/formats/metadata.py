"""``optiq/metadata.json``: how a checkpoint was made. Reads ours and both published forms, writes ours."""

from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_ext.types.metadata import CheckpointMetadata, PublishedMetadata
from mlx_optiq_ext.types.quant import KEEP, BitMap, Choice

__all__ = ["METADATA_FILE", "decode_metadata", "find_metadata", "read_metadata", "write_metadata"]

METADATA_FILE = "optiq/metadata.json"
_OLD_FILE = "optiq_metadata.json"
_FORM = RecordForm(name="conversion record", remedy="convert again with `optiq convert`")


def write_metadata(folder: Path, metadata: CheckpointMetadata) -> Path:
    """Write a checkpoint's metadata and return the file's path.

    Raises:
        ResourceError: The disk is full.
    """
    path = folder / METADATA_FILE
    write_json_atomic(path, metadata)
    return path


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a checkpoint, in its present or its old place."""
    return next((folder / name for name in (METADATA_FILE, _OLD_FILE) if (folder / name).is_file()), None)


def read_metadata(folder: Path) -> CheckpointMetadata | PublishedMetadata:
    """Read a checkpoint's metadata, whoever wrote it.

    Raises:
        UsageError: There is none, or it cannot be understood.
    """
    path = find_metadata(folder)
    if path is None:
        raise UsageError(f"{folder} has no {METADATA_FILE}: optiq did not make this checkpoint")
    return decode_metadata(read_record(path, _FORM), str(path))


def decode_metadata(data: bytes, where: str = METADATA_FILE) -> CheckpointMetadata | PublishedMetadata:
    """Parse our form (it has ``format_version``) or a published one.

    Args:
        data: Content of the file.
        where: Its name, for messages.
    Raises:
        UsageError: Neither form, or a version newer than this package knows.
    """
    document = parse_json(data, where, _FORM)
    if not isinstance(document, dict) or "format_version" in document:
        return convert_record(document, CheckpointMetadata, where, _FORM)
    try:
        return _published(document)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where} is not a {_FORM.name}: {error}; {_FORM.remedy}") from error


class _PublishedChoice(msgspec.Struct, frozen=True):
    bits: int
    group_size: int | None = None
    mode: str | None = None


class _PublishedBody(msgspec.Struct, frozen=True):
    """Published fields; ``optimization`` is where older versions kept the map."""

    base_model: str | None = None
    method: str | None = None
    reference: str | None = None
    target_bpw: float | None = None
    achieved_bpw: float | None = None
    per_layer: dict[str, _PublishedChoice | int | bool] | None = None
    optimization: "_PublishedBody | None" = None


def _published(raw: dict[str, Any]) -> PublishedMetadata:
    body = msgspec.convert(raw, _PublishedBody)
    older = body.optimization or _PublishedBody()
    per_layer = body.per_layer if body.per_layer is not None else older.per_layer
    if per_layer is None:
        raise msgspec.ValidationError("neither format_version nor per_layer is there")
    return PublishedMetadata(
        base_model=body.base_model or older.base_model or "",
        method=body.method or older.method or "",
        reference=body.reference or older.reference or "",
        target_bpw=body.target_bpw if body.target_bpw is not None else older.target_bpw,
        achieved_bpw=body.achieved_bpw if body.achieved_bpw is not None else older.achieved_bpw,
        bit_map=BitMap(choices={path: _choice(entry) for path, entry in per_layer.items()}),
    )


def _choice(entry: _PublishedChoice | int | bool) -> Choice:
    """``false`` and 16 bits and more mean full precision; a missing group size is MLX's default of 64."""
    if isinstance(entry, bool | int):
        entry = _PublishedChoice(bits=entry if entry is not False else KEEP.bits)
    if entry.bits >= KEEP.bits:
        return KEEP
    label = entry.mode if entry.mode not in (None, "affine") else f"{entry.bits}g{entry.group_size or 64}"
    return Choice.parse(str(label))
