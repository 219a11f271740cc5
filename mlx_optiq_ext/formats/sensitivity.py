"""The sensitivity file: everything measured about a model, for any number of later allocations.

JSON with ``format_version``, one unit and one probe per line, so that two files can be compared line by
line. Files of the published package are read too (see ``formats/published.py``).
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.published import table_from_published
from mlx_optiq_ext.formats.records import (
    RecordForm,
    convert_record,
    encode_by_line,
    locate_record,
    read_record,
)
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["decode_sensitivity", "encode_sensitivity", "read_sensitivity", "write_sensitivity"]

_FORM = RecordForm(name="sensitivity file", remedy="measure again with `optiq measure`")
_NAMES = ("sensitivity.json", "optiq/sensitivity.json", "sensitivity_checkpoint.json")
_LINE_PER_ENTRY = ("units", "probes")


def read_sensitivity(path: str | Path) -> SensitivityTable:
    """Read a sensitivity file, ours or the published package's.

    Args:
        path: The file, or a folder that has it at its root or under ``optiq/``.
    Raises:
        UsageError: No such file, not a sensitivity file, or a version this package does not know.
    """
    file = locate_record(Path(path), _NAMES, _FORM)
    return decode_sensitivity(read_record(file, _FORM), str(file))


def write_sensitivity(path: str | Path, table: SensitivityTable) -> None:
    """Write ``table`` in the newest version, in one step.

    Raises:
        MeasurementError: A number is not finite.
        ResourceError: The file cannot be written.
    """
    write_bytes_atomic(Path(path), encode_sensitivity(table))


def encode_sensitivity(table: SensitivityTable) -> bytes:
    """UTF-8 JSON of ``table``; equal tables give equal bytes.

    Raises:
        MeasurementError: A divergence or error is not finite; JSON has no such number.
    """
    for probe in table.probes:
        numbers = (probe.divergence, probe.stderr, *probe.by_domain)
        if not all(math.isfinite(number) for number in numbers):
            raise MeasurementError(
                f"the probe of {probe.path} as {probe.choice.label} is not finite; measure in float32, "
                "and check the calibration text"
            )
    return encode_by_line(table, _LINE_PER_ENTRY)


def decode_sensitivity(data: bytes, where: str) -> SensitivityTable:
    """Parse the content of a sensitivity file.

    Args:
        where: Name of the file, for messages.
    Raises:
        UsageError: See :func:`read_sensitivity`.
    """
    try:
        document: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        document = _decode_leniently(data, where)
    if isinstance(document, list) or (isinstance(document, dict) and "layers" in document):
        return table_from_published(document, where)
    return convert_record(document, SensitivityTable, where, _FORM)


def _decode_leniently(data: bytes, where: str) -> Any:
    """Python's own parser: published files may hold NaN, which JSON has not."""
    try:
        return json.loads(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not JSON ({error}); {_FORM.remedy}") from error
