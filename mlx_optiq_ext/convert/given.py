"""Files in place of a measurement and of a choice: options they leave without effect, what they offer.

Called by ``convert.model`` before the long work.
"""

from collections.abc import Collection
from pathlib import Path

from msgspec.structs import replace

from mlx_optiq_ext.allocate.bitmap import price_bit_map
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.allocation import read_allocation
from mlx_optiq_ext.formats.arguments import flag_name
from mlx_optiq_ext.quant.reference import parse_candidates
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import Allocation, Choice, SensitivityTable

__all__ = ["calibration_notes", "check_given", "given_allocation", "match_correction", "restrict_candidates"]

_ONLY_MEASURING = ("method", "probes", "seed", "label_samples")
_CANDIDATES = ("candidate_bits", "candidate_groups")


def check_given(options: ConvertOptions, given: Collection[str]) -> None:
    """Refuse a conversion without a target, and options that have no effect beside a file.

    Args:
        options: Of the conversion.
        given: Names of the options that were set, where that is known.
    Raises:
        UsageError: Names them.
    """
    if options.sensitivity:
        _refuse_beside("--sensitivity", "a measurement", [name for name in _ONLY_MEASURING if name in given])
    wanted = options.allocate
    if options.allocation:
        if not options.sensitivity:
            raise UsageError(
                f"--allocation needs --sensitivity: the file that {options.allocation} was chosen from"
            )
        unused = [
            name
            for name in AllocateOptions.__struct_fields__
            if getattr(wanted, name) != getattr(AllocateOptions(), name)
        ]
        unused += [name for name in _CANDIDATES if name in given]
        _refuse_beside("--allocation", "choosing", unused)
    elif all(target is None for target in (wanted.target_bpw, wanted.target_size, wanted.fit)):
        raise UsageError("no target: give --target-bpw 5.0, --target-size 4.5GB or --fit 8GB")


def given_allocation(file: Path, table: SensitivityTable) -> Allocation:
    """The choices of a bit map file, with the stored bits and predictions of the table at hand.

    Raises:
        UsageError: It cannot be read, or is not of the table's tensors.
    """
    given = read_allocation(file)
    held = tuple(pin for pin in given.pins if given.bit_map.choices.get(pin.path) == pin.choice)
    return replace(price_bit_map(table, given.bit_map), pins=held, budget=f"--allocation {file.name}")


def match_correction(
    table: SensitivityTable, options: ConvertOptions, given: Collection[str]
) -> ConvertOptions:
    """The options with the correction that the table's errors were measured with.

    Bits chosen for one way of rounding and written with another can be worse than uniform ones. A sweep
    (``kl``), a published file and the static rule say nothing of the correction; they leave it open.

    Args:
        table: Read from the user's file.
        options: Of the conversion.
        given: Names of the options that were set, where that is known.
    Raises:
        UsageError: The user set another correction.
    """
    wanted = options.measure.correction
    if table.method != "fisher" or table.correction == wanted:
        return options
    if "correction" in given or wanted != MeasureOptions().correction:
        raise UsageError(
            f"{options.sensitivity} was measured with --correction {table.correction}, not with "
            f"--correction {wanted}: bits chosen for one way of rounding can do worse than uniform ones with "
            f"another; leave --correction out, or measure with `optiq measure MODEL --correction {wanted}`"
        )
    return replace(options, measure=replace(options.measure, correction=table.correction))


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


def _refuse_beside(flag: str, place: str, unused: Collection[str]) -> None:
    if unused:
        names = ", ".join(flag_name(name) for name in unused)
        raise UsageError(
            f"{flag} takes the place of {place}, and {names} would have no effect: leave out one or the other"
        )


def _labels(choices: Collection[Choice]) -> str:
    return ", ".join(choice.label for choice in sorted(choices, key=lambda choice: (choice.bpw(), choice)))
