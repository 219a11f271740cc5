"""The two factors of an adapter at one module, in one orientation for all kinds and formats.

Knows arrays, not modules or files. Used by all of ``lora`` and by ``adapters``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_optiq_ext.types.adapter import AdapterConfig

__all__ = ["Adapter", "Factors", "pad_rank", "side_by_side"]


class Factors(NamedTuple):
    """What an adapter adds to x·Wᵀ is scale · x·a·b."""

    a: mx.array
    """(I, r); of experts (E, I, r); of an embedding (V, r)."""
    b: mx.array
    """(r, O); of experts (E, r, O); of an embedding (r, D)."""

    @property
    def rank(self) -> int:
        """Columns of ``a``."""
        return int(self.a.shape[-1])

    @property
    def num_parameters(self) -> int:
        """Numbers in both."""
        return int(self.a.size + self.b.size)

    def is_finite(self) -> bool:
        """Whether all numbers are; evaluates."""
        return bool(mx.all(mx.isfinite(self.a)).item()) and bool(mx.all(mx.isfinite(self.b)).item())


class Adapter(NamedTuple):
    """A stored adapter: what it says of itself, and its factors by path, without their scale."""

    config: AdapterConfig
    factors: dict[str, Factors]


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """The sum of several products: their ranks one behind the other; exact, lazy."""
    return Factors(
        mx.concatenate([each.a for each in parts], axis=-1),
        mx.concatenate([each.b for each in parts], axis=-2),
    )


def pad_rank(factors: Factors, rank: int) -> Factors:
    """The same product with zero columns and rows up to ``rank``; lazy."""
    more = rank - factors.rank
    leading = [(0, 0)] * (factors.a.ndim - 1)
    return Factors(
        mx.pad(factors.a, [*leading, (0, more)]),
        mx.pad(factors.b, [*leading[:-1], (0, more), (0, 0)]),
    )
