"""The sensitivity table that a conversion starts from, before anything is measured.

Either the file that the user gives, checked against the model, or an outline by shape that only serves to
find out whether the budget, the pins and the disk will do. Called by ``convert.model``.
"""

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from mlx_optiq_ext.errors import FingerprintMismatch
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.models.walk import total_numel
from mlx_optiq_ext.quant.reference import Reference
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.quant.static import static_probes
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import Probe, SensitivityTable, Unit

__all__ = ["outline_table", "read_table"]


def outline_table(reference: Reference, options: MeasureOptions) -> SensitivityTable:
    """What will be measured, with values by shape in place of measured ones; reads no weights."""
    return measure_sensitivity(reference.ref, replace(options, method="static"), reference=reference)


def read_table(file: Path, reference: Reference) -> SensitivityTable:
    """Read a sensitivity file, ours or the published package's, for the opened model.

    Returns:
        The table with the facts of the checkpoint that will be written (type of scales, what is no unit).
    Raises:
        UsageError: It cannot be read.
        FingerprintMismatch: It belongs to another model.
    """
    table = read_sensitivity(file)
    if table.method == "published":
        return _complete(table, reference, file)
    if table.model.sha256 != fingerprint(reference.ref).sha256:
        raise FingerprintMismatch(
            f"{file} was measured on {table.model.source or 'another model'}, whose weights differ from "
            f"{reference.ref.source}; measure again with `optiq measure {reference.ref.source}`"
        )
    float_bits = reference.stored_dtype.size * 8
    return replace(table, float_bits=float_bits, fixed_bits=reference.fixed_bits(table.units))


def _complete(table: SensitivityTable, reference: Reference, file: Path) -> SensitivityTable:
    """Add to a published table what it lacks: shapes, unlisted tensors, what is no unit."""
    listed = {unit.path: unit for unit in table.units}
    candidates = tuple({choice for unit in table.units for choice in unit.choices})
    units = tuple(
        replace(unit, choices=listed[unit.path].choices) if unit.path in listed else unit
        for unit in reference.units(candidates)
    )
    same = [u for u in units if u.path in listed and listed[u.path].numel * len(u.paths) == u.numel]
    if 2 * len(same) < len(listed):
        raise FingerprintMismatch(
            f"{file} lists {len(listed)} tensors and {reference.ref.source} has {len(same)} of them with as "
            f"many weights: it belongs to another model; measure with `optiq measure {reference.ref.source}`"
        )
    known = {unit.path for unit in units if unit.path in listed}
    probes = tuple(probe for probe in table.probes if probe.path in known)
    guessed = _guess(units, probes)
    notes = [
        f"not in the published file, by the static rule: {len(units) - len(known)} of {len(units)} tensors"
    ]
    if len(known) < len(listed):
        notes.append(
            f"not in this model: {len(listed) - len(known)} of {len(listed)} tensors of the published file"
        )
    float_bits = reference.stored_dtype.size * 8
    return replace(
        table, units=units, probes=(*probes, *guessed), float_bits=float_bits,
        total_numel=total_numel(reference.model), fixed_bits=reference.fixed_bits(units),
        notes=(*table.notes, *notes),
    )  # fmt: skip


def _guess(units: Sequence[Unit], probes: Sequence[Probe]) -> list[Probe]:
    """Values by shape for units without any, on the scale of the others' values."""
    by_shape = {(p.path, p.choice): p for p in static_probes(units)}
    measured = sum(p.divergence for p in probes)
    expected = sum(by_shape[p.path, p.choice].divergence for p in probes)
    scale = measured / expected if expected > 0 else 1.0
    known = {probe.path for probe in probes}
    return [replace(p, divergence=p.divergence * scale) for p in by_shape.values() if p.path not in known]
