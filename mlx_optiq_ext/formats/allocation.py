"""The bit map file: an allocation with its budget and prediction, as ``optiq allocate -o`` writes it."""

from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.types.quant import Allocation

__all__ = ["read_allocation", "write_allocation"]

_VERSION = 1


def write_allocation(path: str | Path, allocation: Allocation) -> None:
    """Write ``allocation`` as indented JSON, in one step.

    Raises:
        ResourceError: The file cannot be written.
    """
    write_json_atomic(Path(path), allocation)


def read_allocation(path: str | Path) -> Allocation:
    """Read a bit map file.

    Raises:
        UsageError: No such file, not a bit map file, or a version this package does not know.
    """
    try:
        document: Any = msgspec.json.decode(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read bit map {path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON ({error}); write it again with `optiq allocate -o`") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != _VERSION:
        raise UsageError(
            f"{path} has format_version {version!r}, this package reads {_VERSION}; write it again with "
            "`optiq allocate -o`"
        )
    try:
        return msgspec.convert(document, Allocation)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} is not a valid bit map: {error}; `optiq allocate -o` makes one") from error
