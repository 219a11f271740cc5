"""Small sensitivity tables with known facts, for tests of the allocator and its files."""

from collections.abc import Mapping, Sequence

from mlx_optiq_ext.types.quant import (
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Probe,
    SensitivityTable,
    Unit,
)


def choices(*labels: str) -> tuple[Choice, ...]:
    """Choices by label, in ascending order of stored bits."""
    return tuple(sorted((Choice.parse(label) for label in labels), key=lambda c: (c.bpw(), c)))


def small_table(
    units: Sequence[Unit],
    divergences: Mapping[str, Mapping[str, float]],
    *,
    fixed_bits: int = 0,
    fixed_numel: int = 0,
    extra_probes: Sequence[Probe] = (),
    domains: tuple[str, ...] = (),
) -> SensitivityTable:
    """Table of ``units`` with estimated ``divergences[path][label]``."""
    probes = [
        Probe(path=path, choice=Choice.parse(label), divergence=value)
        for path, row in divergences.items()
        for label, value in row.items()
    ]
    return SensitivityTable(
        model=ModelFingerprint(model_type="llama", sha256="00"),
        method="fisher",
        reference="resident",
        correction="none",
        calibration=CalibrationInfo(
            source="built-in", sha256="00", num_tokens=64, num_windows=1, domains=domains
        ),
        domains=domains,
        units=tuple(units),
        probes=(*probes, *extra_probes),
        total_numel=sum(unit.numel for unit in units) + fixed_numel,
        fixed_bits=fixed_bits,
    )


def linear(path: str, offered: Sequence[Choice], *, rows: int = 64, columns: int = 128, **facts) -> Unit:
    """A linear of ``rows`` × ``columns``."""
    return Unit(
        **{
            "paths": (path,),
            "shape": (rows, columns),
            "numel": rows * columns,
            "kind": "linear",
            "choices": tuple(offered),
            **facts,
        }
    )
