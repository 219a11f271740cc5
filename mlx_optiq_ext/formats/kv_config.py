"""``kv_config.json``: how a model's KV cache is stored.

Our form has a ``format_version``; the published package's list, which knows no difference between keys and
values, is read too. Written by ``optiq kv-cache``; read wherever caches are made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.records import (
    RecordForm,
    convert_record,
    locate_record,
    parse_json,
    read_record,
)
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import KEEP, Choice

__all__ = [
    "KV_CONFIG_FILE",
    "decode_kv_config",
    "encode_kv_config",
    "kv_config_from",
    "read_kv_config",
    "write_kv_config",
]

KV_CONFIG_FILE = "kv_config.json"
_PLACES = (KV_CONFIG_FILE, f"optiq/{KV_CONFIG_FILE}")
_FORM = RecordForm(name="KV configuration", remedy="make one with `optiq kv-cache MODEL`")
_DEFAULT_GROUP = 64
_KEEP_BITS = 16


class _Published(msgspec.Struct, kw_only=True):
    """One entry of the published list."""

    layer_idx: int
    bits: int
    group_size: int = _DEFAULT_GROUP


def read_kv_config(path: str | Path) -> KVConfig:
    """Read a KV configuration, ours or the published package's.

    Args:
        path: The file, or a folder that has ``kv_config.json`` at its root or under ``optiq/``.
    Raises:
        UsageError: No such file, not a KV configuration, or a version this package does not know.
    """
    file = locate_record(Path(path).expanduser(), _PLACES, _FORM)
    return decode_kv_config(read_record(file, _FORM), str(file))


def write_kv_config(path: str | Path, config: KVConfig) -> None:
    """Write ``config`` in the newest version, in one step.

    Raises:
        ResourceError: The file cannot be written.
    """
    write_bytes_atomic(Path(path), encode_kv_config(config))


def encode_kv_config(config: KVConfig) -> bytes:
    """UTF-8 JSON of ``config``, indented; equal configurations give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(config), indent=1) + b"\n"


def decode_kv_config(data: bytes, where: str = KV_CONFIG_FILE) -> KVConfig:
    """Parse the content of a KV configuration file.

    Args:
        data: The content.
        where: Name of the file, for messages.
    Raises:
        UsageError: See :func:`read_kv_config`.
    """
    return kv_config_from(parse_json(data, where, _FORM), where)


def kv_config_from(document: Any, where: str = "the KV configuration") -> KVConfig:
    """Check a decoded document: an object of our form, or the published list.

    Args:
        document: What JSON of the file gives.
        where: What it is called in messages.
    Returns:
        The configuration. From the published form keys and values are stored alike and not rotated, and
        entries have ``index`` −1: it names blocks, and which cache a block fills only the model tells.
    Raises:
        UsageError: It is neither, or a field is out of range.
    """
    if isinstance(document, list):
        return _from_published(document, where)
    config = convert_record(document, KVConfig, where, _FORM)
    for number, layer in enumerate(config.layers):
        for name, choice in (("k", layer.k), ("v", layer.v)):
            _require_choice(choice, f"{where}: layers[{number}].{name}")
        if layer.index < 0 and layer.layer is None:
            raise UsageError(f"{where}: layers[{number}] has neither index nor layer; {_FORM.remedy}")
    for name in ("recent", "first"):
        if getattr(config, name) < 0:
            raise UsageError(f"{where}: {name} is {getattr(config, name)}; use 0 or more tokens")
    _require_distinct([_place(layer) for layer in config.layers], where)
    return config


def _from_published(document: Sequence[Any], where: str) -> KVConfig:
    try:
        entries = msgspec.convert(document, list[_Published])
    except msgspec.ValidationError as error:
        raise UsageError(f"{where} is not a published KV configuration: {error}; {_FORM.remedy}") from error
    if not entries:
        raise UsageError(f"{where} lists no layers; {_FORM.remedy}")
    layers = []
    for number, entry in enumerate(entries):
        choice = KEEP
        if entry.bits != _KEEP_BITS:
            choice = Choice(bits=entry.bits, group_size=entry.group_size)
        _require_choice(choice, f"{where}: entry {number} (layer_idx {entry.layer_idx})")
        if entry.layer_idx < 0:
            raise UsageError(f"{where}: entry {number} has layer_idx {entry.layer_idx}; use 0 or more")
        layers.append(KVLayer(index=-1, layer=entry.layer_idx, k=choice, v=choice))
    _require_distinct([_place(layer) for layer in layers], where)
    return KVConfig(
        layers=tuple(layers),
        rotate=False,
        notes=("read from a published file: keys and values are stored alike, and not rotated",),
    )


def _require_choice(choice: Choice, where: str) -> None:
    """Refuse what a KV cache does not store: only affine codes, or the model's own precision."""
    try:
        known = choice.mode in ("affine", "keep") and Choice.parse(choice.label) == choice
    except UsageError:
        known = False
    if not known:
        raise UsageError(
            f"{where}: {choice.label} is not a storage of a KV cache; use bits 2, 3, 4, 5, 6 or 8 with "
            "group_size 32, 64 or 128, or keep"
        )


def _place(layer: KVLayer) -> str:
    """Which cache an entry means, in words."""
    name = f"index {layer.index}" if layer.index >= 0 else f"layer {layer.layer}"
    return name if layer.member is None else f"{name}, member {layer.member}"


def _require_distinct(places: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for place in places:
        if place in seen:
            raise UsageError(f"{where} has two entries for {place}; leave one")
        seen.add(place)
