"""A sensitivity file in place of a measurement: options it leaves without effect, candidates it offers.

Called by ``convert.model`` before the long work.
"""

from collections.abc import Collection

from msgspec.structs import replace

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import flag_name
from mlx_optiq_ext.quant.reference import parse_candidates
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import Choice, SensitivityTable

__all__ = ["calibration_notes", "refuse_measuring_options", "restrict_candidates"]

_ONLY_MEASURING = ("method", "probes", "seed", "label_samples")


def refuse_measuring_options(given: Collection[str]) -> None:
    """Refuse options that only a measurement would obey.

    Args:
        given: Names of the options that were set.
    Raises:
        UsageError: Names them.
    """
    unused = [flag_name(name) for name in _ONLY_MEASURING if name in given]
    if unused:
        raise UsageError(
            f"--sensitivity takes the place of a measurement, and {', '.join(unused)} would have no effect: "
            "leave out one or the other"
        )


def restrict_candidates(
    table: SensitivityTable, options: MeasureOptions, given: Collection[str]
) -> SensitivityTable:
    """The table with the candidates that were asked for; units that have none of them keep all of theirs.

    Raises:
        UsageError: One was not measured; names those that were.
    """
    measured = {choice for unit in table.units for choice in unit.choices}
    if "candidate_bits" in given:
        wanted = set(parse_candidates(options))
        missing = [choice.label for choice in sorted(wanted - measured)]
    elif "candidate_groups" in given:
        groups = {choice.group_size for choice in parse_candidates(options)}
        wanted = {choice for choice in measured if choice.mode != "affine" or choice.group_size in groups}
        missing = [f"group {group}" for group in sorted(groups - {choice.group_size for choice in measured})]
    else:
        return table
    if missing:
        raise UsageError(
            f"the sensitivity file does not hold {', '.join(missing)}; measured are {_labels(measured)}"
        )
    units = tuple(
        replace(unit, choices=tuple(choice for choice in unit.choices if choice in wanted) or unit.choices)
        for unit in table.units
    )
    left = {(unit.path, choice) for unit in units for choice in unit.choices}
    probes = tuple(probe for probe in table.probes if (probe.path, probe.choice) in left)
    return replace(table, units=units, probes=probes)


def calibration_notes(table: SensitivityTable, options: MeasureOptions) -> tuple[str, ...]:
    """Say so where the rounding sees other text than the measurement did."""
    source = table.calibration.source
    if options.calibration is not None or not table.calibration.sha256 or source.startswith("built-in"):
        return ()
    return (
        f"measured on {source}, rounded on the built-in text; give --calibration again to round on the same",
    )


def _labels(choices: Collection[Choice]) -> str:
    return ", ".join(choice.label for choice in sorted(choices, key=lambda choice: (choice.bpw(), choice)))
