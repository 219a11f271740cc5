"""The bit map file: an allocation with its budget and prediction.

``optiq allocate -o`` writes it.
"""

from pathlib import Path

from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_ext.types.quant import Allocation

__all__ = ["read_allocation", "write_allocation"]

_FORM = RecordForm(name="bit map", remedy="write it again with `optiq allocate -o`")


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
    document = parse_json(read_record(Path(path), _FORM), str(path), _FORM)
    return convert_record(document, Allocation, str(path), _FORM)
