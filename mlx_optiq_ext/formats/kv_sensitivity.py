"""``kv_sensitivity.json``: everything measured about a model's KV cache.

JSON with ``format_version``, one cache and one probe per line. The published package's list is read too; it
measured keys and values together. Written and read by ``optiq kv-cache``.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.records import (
    RecordForm,
    convert_record,
    encode_by_line,
    locate_record,
    read_record,
)
from mlx_optiq_ext.types.kv import KVProbe, KVSensitivity, KVSite
from mlx_optiq_ext.types.quant import AFFINE_GROUPS, Choice

__all__ = [
    "KV_SENSITIVITY_FILE",
    "decode_kv_sensitivity",
    "encode_kv_sensitivity",
    "kv_sensitivity_sha256",
    "read_kv_sensitivity",
    "write_kv_sensitivity",
]

KV_SENSITIVITY_FILE = "kv_sensitivity.json"
_PLACES = (KV_SENSITIVITY_FILE, f"optiq/{KV_SENSITIVITY_FILE}")
_FORM = RecordForm(name="KV sensitivity file", remedy="measure again with `optiq kv-cache MODEL`")
_LINE_PER_ENTRY = ("sites", "probes", "scores")
_DEFAULT_GROUP = 64


class _Published(msgspec.Struct, kw_only=True):
    """One entry of the published list."""

    layer_idx: int
    sensitivities: dict[str, float | None]
    n_kv_heads: int
    head_dim: int
    layer_name: str = ""


def read_kv_sensitivity(path: str | Path) -> KVSensitivity:
    """Read a KV sensitivity file, ours or the published package's.

    Args:
        path: The file, or a folder that has it at its root or under ``optiq/``.
    Raises:
        UsageError: No such file, not a KV sensitivity file, or a version this package does not know.
    """
    file = locate_record(Path(path).expanduser(), _PLACES, _FORM)
    return decode_kv_sensitivity(read_record(file, _FORM), str(file))


def write_kv_sensitivity(path: str | Path, table: KVSensitivity) -> None:
    """Write ``table`` in the newest version, in one step.

    Raises:
        MeasurementError: A number is not finite.
        ResourceError: The file cannot be written.
    """
    write_bytes_atomic(Path(path), encode_kv_sensitivity(table))


def kv_sensitivity_sha256(table: KVSensitivity) -> str:
    """Hash of the file that :func:`write_kv_sensitivity` writes: :attr:`KVConfig.sensitivity_sha256`."""
    return hashlib.sha256(encode_kv_sensitivity(table)).hexdigest()


def encode_kv_sensitivity(table: KVSensitivity) -> bytes:
    """UTF-8 JSON of ``table``; equal tables give equal bytes.

    Raises:
        MeasurementError: A divergence or error is not finite; JSON has no such number.
    """
    for probe in table.probes:
        if not all(map(math.isfinite, (probe.divergence, probe.stderr, *probe.by_length))):
            raise MeasurementError(
                f"the probe of the {'keys' if probe.tensor == 'k' else 'values'} of cache {probe.index} as "
                f"{probe.choice.label} is not finite; measure in float32, and check the calibration text"
            )
    return encode_by_line(table, _LINE_PER_ENTRY)


def decode_kv_sensitivity(data: bytes, where: str = KV_SENSITIVITY_FILE) -> KVSensitivity:
    """Parse the content of a KV sensitivity file.

    Args:
        data: The content.
        where: Name of the file, for messages.
    Returns:
        The table. From the published form half of each divergence is given to the keys, half to the values.
    Raises:
        UsageError: See :func:`read_kv_sensitivity`.
    """
    try:
        document = json.loads(data)  # not msgspec: published files may hold NaN, which JSON has not
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} is not JSON ({error}); {_FORM.remedy}") from error
    if isinstance(document, list):
        return _from_published(document, where)
    return convert_record(document, KVSensitivity, where, _FORM)


def _from_published(document: Sequence[Any], where: str) -> KVSensitivity:
    try:
        entries = msgspec.convert(document, list[_Published])
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{where} is not a published KV sensitivity file: {error}; {_FORM.remedy}"
        ) from error
    if not entries:
        raise UsageError(f"{where} lists no layers; {_FORM.remedy}")
    sites = [
        KVSite(
            index=entry.layer_idx,
            layer=entry.layer_idx,
            heads=entry.n_kv_heads,
            key_dim=entry.head_dim,
            value_dim=entry.head_dim,
        )
        for entry in entries
    ]
    return KVSensitivity(
        lengths=(),
        sites=tuple(sites),
        rotate=False,
        probes=tuple(probe for entry in entries for probe in _probes(entry, where)),
        notes=(
            "read from a published file: keys and values were measured together, half of each divergence is "
            "given to either; caches are taken to have the index of their block; errors are unknown",
        ),
    )


def _probes(entry: _Published, where: str) -> list[KVProbe]:
    """Finite measurements of one entry, in ascending bits, for keys and for values."""
    groups = (_DEFAULT_GROUP, *sorted(AFFINE_GROUPS, reverse=True))
    group = next((group for group in groups if entry.head_dim > 0 and entry.head_dim % group == 0), None)
    found = {}
    for label, value in entry.sensitivities.items():
        if value is None or not math.isfinite(value):
            continue
        try:
            choice = Choice.parse(label, default_group=group or _DEFAULT_GROUP)
        except UsageError as error:
            raise UsageError(f"{where}: layer_idx {entry.layer_idx}, sensitivities: {error}") from error
        if not choice.fits(entry.head_dim):
            raise UsageError(
                f"{where}: layer_idx {entry.layer_idx} has head_dim {entry.head_dim}, which no group "
                f"divides; {_FORM.remedy}"
            )
        found[choice] = value
    if not found:
        raise UsageError(f"{where}: layer_idx {entry.layer_idx} has no finite measurement; {_FORM.remedy}")
    return [
        KVProbe(
            index=entry.layer_idx, tensor=tensor, choice=choice, divergence=found[choice] / 2, exact=False
        )
        for tensor in ("k", "v")
        for choice in sorted(found)
    ]
