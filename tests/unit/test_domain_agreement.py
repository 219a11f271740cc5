"""Rank correlation of a sensitivity table's domains."""

import math

import pytest

from mlx_optiq_ext.measure.domains import domain_rank_correlation
from mlx_optiq_ext.types.quant import (
    KEEP,
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Probe,
    SensitivityTable,
)

FOUR, THREE = Choice(bits=4, group_size=64), Choice(bits=3, group_size=64)


def table_of(domains, columns):
    """A table from {choice: rows of per-domain values}."""
    probes = tuple(
        Probe(path=f"unit{row}", choice=choice, divergence=sum(values), by_domain=tuple(values))
        for choice, rows in columns.items()
        for row, values in enumerate(rows)
    )
    info = CalibrationInfo(source="test", sha256="0", num_tokens=0, num_windows=0, domains=domains)
    return SensitivityTable(
        model=ModelFingerprint(model_type="llama", sha256="0"),
        method="fisher",
        reference="resident",
        correction="none",
        calibration=info,
        domains=domains,
        units=(),
        probes=probes,
        total_numel=0,
        fixed_bits=0,
    )


def test_the_domain_that_ranks_otherwise_is_found_per_choice():
    rows = [(1.0, 2.0, 9.0), (2.0, 3.0, 5.0), (3.0, 5.0, 4.0), (4.0, 4.0, 1.0)]
    table = table_of(("prose", "chat", "code"), {FOUR: rows, THREE: [(*row[:2], row[0]) for row in rows]})
    three, four = domain_rank_correlation(table)
    assert (three.choice, four.choice) == (THREE, FOUR)
    assert four.num_units == 4
    assert four.matrix[0][1] == four.matrix[1][0] == pytest.approx(0.8)
    assert four.matrix[0][2] == pytest.approx(-1.0)
    assert [four.matrix[i][i] for i in range(3)] == [1.0, 1.0, 1.0]
    assert four.worst_pair == ("prose", "code")
    assert four.worst == pytest.approx(-1.0)
    assert min(range(3), key=lambda i: four.with_rest[i]) == 2
    assert three.matrix[0][2] == pytest.approx(1.0)


def test_a_constant_domain_counts_as_the_worst():
    table = table_of(("a", "b", "c"), {FOUR: [(1.0, 2.0, 7.0), (2.0, 1.0, 7.0), (3.0, 3.0, 7.0)]})
    (agreement,) = domain_rank_correlation(table)
    assert agreement.worst_pair == ("a", "c")
    assert math.isnan(agreement.worst)


def test_nothing_is_reported_where_nothing_can_be_compared():
    rows = [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert domain_rank_correlation(table_of(("a",), {FOUR: [row[:1] for row in rows]})) == ()
    assert domain_rank_correlation(table_of(("a", "b"), {FOUR: rows[:2], KEEP: rows})) == ()
    assert domain_rank_correlation(table_of(("a", "b"), {FOUR: [()] * 5})) == ()
    assert domain_rank_correlation(table_of(("a", "b"), {FOUR: [(1.0, math.nan)] * 5})) == ()
