"""Where the domains of a calibration disagree about which units are sensitive.

Reads a sensitivity table; knows nothing of text or models. Called by ``optiq measure`` and the reports.
"""

import math
from itertools import combinations

import msgspec
import numpy as np

from mlx_optiq_ext.measure.intervals import spearman
from mlx_optiq_ext.types.quant import Choice, Probe, SensitivityTable

__all__ = ["DomainAgreement", "domain_rank_correlation"]


class DomainAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Rank correlation between domains over the units probed at one choice."""

    choice: Choice
    num_units: int
    domains: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    """Spearman of every pair of domains; symmetric, ones on the diagonal."""
    with_rest: tuple[float, ...]
    """Spearman of every domain with the mean of the others: low marks the odd one out."""
    worst_pair: tuple[str, str]
    worst: float
    """Spearman of that pair, -1 to 1."""


def domain_rank_correlation(table: SensitivityTable, *, min_units: int = 3) -> tuple[DomainAgreement, ...]:
    """Compare the domains' rankings of the units, choice by choice.

    Args:
        table: Needs two domains and probes with ``by_domain``; probes without it are passed over.
        min_units: Choices with fewer units than this have no ranking to speak of.
    Returns:
        One entry per choice in ascending order of bits per weight; empty where nothing can be compared.
    """
    width = len(table.domains)
    if width < 2:
        return ()
    groups: dict[Choice, list[Probe]] = {}
    for probe in table.probes:
        usable = len(probe.by_domain) == width and all(math.isfinite(value) for value in probe.by_domain)
        if usable and probe.choice.mode != "keep":
            groups.setdefault(probe.choice, []).append(probe)
    ordered = sorted(groups, key=lambda choice: (choice.bpw(table.float_bits), choice.label))
    return tuple(_agreement(table.domains, c, groups[c]) for c in ordered if len(groups[c]) >= min_units)


def _agreement(domains: tuple[str, ...], choice: Choice, probes: list[Probe]) -> DomainAgreement:
    """Correlate the columns of one choice's units × domains table."""
    values = np.array([probe.by_domain for probe in probes], dtype=np.float64)
    count = len(domains)
    matrix = np.eye(count)
    for i, j in combinations(range(count), 2):
        matrix[i, j] = matrix[j, i] = spearman(values[:, i], values[:, j])
    # A pair that cannot be ranked (a constant column) agrees on nothing: it counts as the worst.
    pairs = list(combinations(range(count), 2))
    first, second = min(pairs, key=lambda pair: -2.0 if math.isnan(matrix[pair]) else float(matrix[pair]))
    rest = [spearman(values[:, i], np.delete(values, i, axis=1).mean(axis=1)) for i in range(count)]
    return DomainAgreement(
        choice=choice,
        num_units=len(probes),
        domains=domains,
        matrix=tuple(tuple(float(value) for value in row) for row in matrix),
        with_rest=tuple(rest),
        worst_pair=(domains[first], domains[second]),
        worst=float(matrix[first, second]),
    )
