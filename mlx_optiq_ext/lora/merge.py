"""Add adapters up: one adapter that computes the weighted sum of several, exactly.

Factors stand side by side, so ranks add up and nothing is approximated. Called by ``optiq lora merge``.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import AdapterError, FingerprintMismatch
from mlx_optiq_ext.lora.factors import Adapter, Factors, side_by_side
from mlx_optiq_ext.types.adapter import AdapterConfig, TrainingFacts
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = ["merge_adapters"]


def merge_adapters(parts: Sequence[tuple[Adapter, float]], names: Sequence[str] = ()) -> Adapter:
    """The adapter that adds Σ weight · scale · B·A·x of all parts.

    Args:
        parts: Adapters of one base with their weights, which may be negative.
        names: What to call them in the result's facts.
    Returns:
        float32 factors, lazy; a module that only some parts adapt has their ranks alone.
    Raises:
        AdapterError: Nothing to merge, or factors of one module have different shapes.
        FingerprintMismatch: Two parts were made for different bases.
    """
    if not parts:
        raise AdapterError("no adapter to merge; name one or more folders")
    configs = [adapter.config for adapter, _ in parts]
    # One factor for all where that is possible keeps the numbers of the factors as they are.
    scales = {config.scale_of(path) for config in configs for path in config.ranks}
    scale = scales.pop() if len(scales) == 1 else 1.0
    factors: dict[str, Factors] = {}
    for path in sorted({path for adapter, _ in parts for path in adapter.factors}):
        own = [
            _weighted(adapter.factors[path], weight * adapter.config.scale_of(path) / scale)
            for adapter, weight in parts
            if path in adapter.factors
        ]
        if len({(*each.a.shape[:-1], each.b.shape[-1]) for each in own}) > 1:
            raise AdapterError(f"{path} has different shapes in the adapters; they are of different bases")
        factors[path] = side_by_side(own)
    settings: dict[str, str | float | bool | None] = {
        (names[k] if k < len(names) else f"part {k + 1}"): weight for k, (_, weight) in enumerate(parts)
    }
    config = AdapterConfig(
        base=_common_base(configs),
        ranks={path: each.rank for path, each in factors.items()},
        scale=scale,
        embeddings=tuple(sorted({path for config in configs for path in config.embeddings})),
        training=TrainingFacts(method="merge", settings=settings),
        code_version=__version__,
    )
    return Adapter(config, factors)


def _weighted(factors: Factors, weight: float) -> Factors:
    b = factors.b.astype(mx.float32)
    return Factors(factors.a.astype(mx.float32), b if weight == 1.0 else weight * b)


def _common_base(configs: Sequence[AdapterConfig]) -> ModelFingerprint | None:
    """The base of all; those that have no hash are taken at their word where their name is the same."""
    known = [config.base for config in configs if config.base is not None and config.base.sha256]
    for base in known[1:]:
        if base.sha256 != known[0].sha256:
            raise FingerprintMismatch(
                f"the adapters were made for different weights, {known[0].source or 'unnamed'} and "
                f"{base.source or 'unnamed'}; merge adapters of one base"
            )
    return known[0] if known else next((config.base for config in configs if config.base is not None), None)
