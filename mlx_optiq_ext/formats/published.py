"""Sensitivity files of the published package: ``sensitivity.json`` and ``sensitivity_checkpoint.json``.

They name tensors, nominal bits and a divergence per bit width; shapes, domains, errors and hashes are not
in them, and what is not quantizable is not counted. Called by ``sensitivity``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.quant import (
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Probe,
    SensitivityTable,
    Unit,
    UnitKind,
)

__all__ = ["table_from_published"]

_BLOCK = re.compile(r"^.*?\.(?:layers|h|blocks)\.(\d+)\.(.+)$")
_DEFAULT_GROUP = 64


class _Layer(msgspec.Struct, kw_only=True):
    """One entry of the published list."""

    layer_name: str
    sensitivities: dict[str, float | None]
    param_count: int = 0
    metadata: dict[str, Any] | None = None


def table_from_published(document: Sequence[Any] | Mapping[str, Any], where: str) -> SensitivityTable:
    """Turn the published form into a table; units have only the facts the file states.

    Args:
        document: The parsed file: a list of entries, or an object with ``layers``.
        where: Name of the file, for messages.
    Raises:
        UsageError: An entry is malformed, or has no weights or no finite measurement.
    """
    head: Mapping[str, Any] = document if isinstance(document, Mapping) else {}
    entries = head["layers"] if isinstance(document, Mapping) else document
    try:
        layers = msgspec.convert(entries, list[_Layer])
        group = msgspec.convert(head.get("group_size") or _DEFAULT_GROUP, int)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{where} is not a published sensitivity file: {error}; measure again with `optiq measure`"
        ) from error
    if not layers:
        raise UsageError(f"{where} lists no tensors; measure again")
    units, probes = [], []
    for layer in layers:
        found = _probes(layer, group, where)
        units.append(_unit(layer, tuple(probe.choice for probe in found), where))
        probes += found
    return SensitivityTable(
        model=ModelFingerprint(model_type="", sha256="", source=str(head.get("base_model") or "")),
        method="published",
        reference="none",
        correction="none",
        calibration=CalibrationInfo(source="published", sha256="", num_tokens=0, num_windows=0, domains=()),
        domains=(),
        units=tuple(units),
        probes=tuple(probes),
        total_numel=sum(unit.numel for unit in units),
        fixed_bits=0,
        notes=(
            "read from a published file: tensors that are not listed in it are not counted, shapes and "
            "errors are unknown",
        ),
    )


def _probes(layer: _Layer, group: int, where: str) -> list[Probe]:
    """Finite measurements of one entry, in ascending bits."""
    probes = []
    for label, value in layer.sensitivities.items():
        if value is not None and math.isfinite(value):
            choice = Choice.parse(label, default_group=group)
            probes.append(Probe(path=_path(layer), choice=choice, divergence=value, exact=True))
    if not probes:
        raise UsageError(f"{where}: {layer.layer_name} has no finite measurement; measure again")
    return sorted(probes, key=lambda probe: (probe.choice.bpw(), probe.choice))


def _unit(layer: _Layer, choices: tuple[Choice, ...], where: str) -> Unit:
    """The facts of one entry."""
    if layer.param_count <= 0:
        raise UsageError(f"{where}: {layer.layer_name} has no param_count; measure again")
    path = _path(layer)
    inside = _BLOCK.match(path)
    shape = (layer.metadata or {}).get("shape")
    is_shape = isinstance(shape, list) and all(isinstance(n, int) for n in shape)
    is_shape = is_shape and math.prod(shape or ()) == layer.param_count
    return Unit(
        paths=(path,),
        shape=tuple(int(n) for n in shape) if is_shape and shape else (),
        numel=layer.param_count,
        kind=_kind(path),
        block=int(inside[1]) if inside else None,
        module=inside[2] if inside else path,
        choices=choices,
    )


def _path(layer: _Layer) -> str:
    return layer.layer_name.removesuffix(".weight")


def _kind(path: str) -> UnitKind:
    """Kind as far as the name tells."""
    name = path.rsplit(".", 1)[-1]
    if name in {"embed_tokens", "wte", "word_embeddings", "tok_embeddings"}:
        return "embedding"
    if name in {"lm_head", "output"}:
        return "head"
    return "router" if name in {"gate", "router"} else "linear"
