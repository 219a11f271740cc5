"""The structural rule: a sensitivity by shape and role, for models that cannot be measured.

No weights are read and nothing is claimed about this model; the numbers only order the choices so that the
common allocator can be used.
"""

import math
from collections.abc import Sequence

from mlx_optiq_ext.types.quant import Probe, Unit

__all__ = ["static_probes"]

_FOUR_BIT_TOTAL = 0.15
"""Nats per token at uniform 4 bits, group 64: typical of small models; only ratios matter."""
_ROLE_WEIGHT = {
    "v_proj": 2.5,
    "down_proj": 2.0,
    "o_proj": 1.3,
    "q_proj": 0.8,
    "k_proj": 1.0,
    "w2": 2.0,
    "out_proj": 1.3,
}
_KIND_WEIGHT = {
    "head": 2.0,
    "embedding": 1.5,
    "router": 4.0,
    "experts": 1.0,
    "linear": 1.0,
    "multilinear": 2.0,
}
_PER_BIT = 4.3
"""Factor of divergence per bit: error variance falls fourfold per bit, measured 4.3 on trained weights."""


def static_probes(units: Sequence[Unit]) -> tuple[Probe, ...]:
    """One value per unit × choice: role weight × share of the weights × 4.3^(4 − bits).

    Smaller groups count as the fraction of a bit that their range gains.
    """
    weights = {unit.path: _weight(unit) for unit in units}
    total = sum(weights.values())
    return tuple(
        Probe(
            path=unit.path,
            choice=choice,
            divergence=0.0
            if choice.mode == "keep"
            else _FOUR_BIT_TOTAL
            * weights[unit.path]
            / total
            * _PER_BIT ** -(_effective_bits(choice.bits, choice.group_size) - 4),
        )
        for unit in units
        for choice in unit.choices
    )


def _weight(unit: Unit) -> float:
    leaf = unit.path.rsplit(".", 1)[-1]
    return unit.numel * math.sqrt(unit.active_share) * _KIND_WEIGHT[unit.kind] * _ROLE_WEIGHT.get(leaf, 1.0)


def _effective_bits(bits: int, group_size: int) -> float:
    return bits + 0.15 * math.log2(64 / group_size)
