"""How far a model with a stored KV cache is from the same model with a full-precision one.

Fills each cache with a real prefix, then compares the logits of the tokens behind it, by prefix length.
Called for the acceptance of a configuration and by ``optiq score --kv-config``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.measure.divergence import kl_divergence, negative_log_likelihood, top1_agreement
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.types.kv import KVConfig
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["CacheNumbers", "NamedConfig", "measured_positions", "score_caches"]

_CHUNK = 1024
_MOST_POSITIONS = 256
Floats = NDArray[np.float64]


class NamedConfig(NamedTuple):
    """A cache configuration to score."""

    label: str
    config: KVConfig


class CacheNumbers(NamedTuple):
    """One configuration on windows of one length; one number per window, means over measured positions."""

    divergence: Floats
    top1: Floats
    nll: Floats
    nbytes: int
    """Bytes that the caches held at the end of a window."""


def measured_positions(length: int) -> int:
    """Positions at the end of a window that are compared: half of it, at most 256."""
    return min(length // 2, _MOST_POSITIONS)


def score_caches(
    model: nn.Module,
    tokens: NDArray[np.int32],
    configs: Sequence[NamedConfig],
    *,
    block: int | None = None,
    progress: ProgressSink = ignore_progress,
) -> tuple[CacheNumbers, ...]:
    """Compare configurations with full-precision caches, all on the same windows.

    Args:
        model: In the form it runs in.
        tokens: int32 (W, T).
        configs: What to compare.
        block: Tokens per step over the measured positions; None: all at once. Small blocks show what a
            window of recent tokens in full precision is worth, for only whole blocks are recent.
        progress: Stage ``score``, one event per window and configuration.
    Returns:
        Numbers of the full-precision cache (divergence 0), then of each configuration in order.
    Cost: per window and configuration one forward; logits of the measured positions only.
    """
    rows: list[list[tuple[float, float, float, int]]] = [[] for _ in range(len(configs) + 1)]
    total, done = len(tokens) * (len(configs) + 1), 0
    for window in tokens:
        reference, nbytes = _logits(model, make_prompt_cache(model), window, block)
        following = mx.array(window[-reference.shape[0] :])[None]
        nll = float(np.asarray(negative_log_likelihood(reference[None], following)).mean())
        rows[0].append((0.0, 1.0, nll, nbytes))
        done += 1
        for row, named in zip(rows[1:], configs, strict=True):
            detail = f"{len(window)} tokens, {named.label}"
            progress(Progress(stage="score", done=done, total=total, detail=detail))
            logits, nbytes = _logits(model, build_caches(model, named.config), window, block)
            row.append(
                (
                    float(np.asarray(kl_divergence(reference, logits)).mean(dtype=np.float64)),
                    float(np.asarray(top1_agreement(reference, logits)).mean()),
                    float(np.asarray(negative_log_likelihood(logits[None], following)).mean()),
                    nbytes,
                )
            )
            del logits
            mx.clear_cache()
            done += 1
        progress(Progress(stage="score", done=done, total=total, detail=f"{len(window)} tokens"))
    return tuple(
        CacheNumbers(
            np.array([entry[0] for entry in row]),
            np.array([entry[1] for entry in row]),
            np.array([entry[2] for entry in row]),
            row[-1][3],
        )
        for row in rows
    )


def _logits(
    model: nn.Module, caches: list[Any], window: NDArray[np.int32], block: int | None
) -> tuple[mx.array, int]:
    """Logits (P, V) float32 of the measured positions behind a prefix, and the bytes of the caches."""
    run: Any = model
    tokens = mx.array(window)[None]
    start = len(window) - measured_positions(len(window))
    for chunk in range(0, start, _CHUNK):
        run(tokens[:, chunk : min(chunk + _CHUNK, start)], cache=caches)
        mx.eval([cache.state for cache in caches])
    parts = []
    for chunk in range(start, len(window), block or len(window)):
        part = logits_of(run(tokens[:, chunk : chunk + (block or len(window))], cache=caches))
        parts.append(part[0].astype(mx.float32))
        mx.eval(parts[-1], [cache.state for cache in caches])
    nbytes = sum(cache.nbytes for cache in caches if not cache.empty())
    return mx.concatenate(parts), nbytes
