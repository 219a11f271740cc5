"""Reading our own JSON files: bytes, version and fields checked in one way, with the same words.

Knows no particular file; called by the modules of those that have a ``format_version``.
"""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mlx_optiq_ext.errors import UsageError

__all__ = [
    "RecordForm",
    "convert_record",
    "encode_by_line",
    "locate_record",
    "parse_json",
    "read_record",
]

_S = TypeVar("_S", bound=msgspec.Struct)


class RecordForm(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of file, as messages speak of it."""

    name: str
    """What a reader calls it: ``bit map``."""
    remedy: str
    """What makes a good one: ``measure again``."""
    newest: int = 1
    """The ``format_version`` that is written; all from 1 on are read."""


def locate_record(path: Path, names: Sequence[str], form: RecordForm) -> Path:
    """The file itself, or the first of ``names`` that a folder has.

    Raises:
        UsageError: The folder has none of them.
    """
    if not path.is_dir():
        return path
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UsageError(f"{path} has no {form.name} ({', '.join(names)}); {form.remedy}")
    return found


def read_record(path: Path, form: RecordForm) -> bytes:
    """Content of a file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {form.name} {path}: {error.strerror or error}; {form.remedy}"
        ) from error


def parse_json(data: bytes, where: str, form: RecordForm) -> Any:
    """Decode JSON.

    Raises:
        UsageError: It is none.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not JSON ({error}); {form.remedy}") from error


def convert_record(document: Any, kind: type[_S], where: str, form: RecordForm) -> _S:
    """Check a decoded document's version, then its fields.

    Args:
        document: Of any JSON type.
        kind: The Struct of the newest version; older ones differ by fields with a default.
        where: Name of the file, for messages.
        form: Which kind of file it should be.
    Raises:
        UsageError: No version, one that this package does not know, or fields that do not fit.
    """
    if not isinstance(document, dict) or "format_version" not in document:
        raise UsageError(f"{where} is not a {form.name}: it has no format_version; {form.remedy}")
    version = document["format_version"]
    if not isinstance(version, int) or not 1 <= version <= form.newest:
        raise UsageError(
            f"{where} has format version {version!r}, this package reads up to {form.newest}: upgrade "
            f"mlx-optiq-ext, or {form.remedy}"
        )
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where} is not a valid {form.name}: {error}; {form.remedy}") from error


def encode_by_line(record: msgspec.Struct, line_per_entry: Container[str]) -> bytes:
    """UTF-8 JSON, one field a line; of the named fields, which are sequences, one entry a line."""
    fields = []
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if name in line_per_entry and value:
            lines = b",\n  ".join(msgspec.json.encode(entry) for entry in value)
            body = b"[\n  " + lines + b"\n ]"
        else:
            body = msgspec.json.encode(value)
        fields.append(b' "' + name.encode() + b'": ' + body)
    return b"{\n" + b",\n".join(fields) + b"\n}\n"
