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

from mlx_optiq_ext.eval.logits import LogitCache, require_vocabulary
from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.measure.divergence import kl_divergence, negative_log_likelihood, top1_agreement
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.types.kv import KVConfig
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["CacheNumbers", "NamedConfig", "block_of", "logits_behind", "measured_positions", "score_caches"]

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


def block_of(configs: Sequence[KVConfig]) -> int | None:
    """Tokens per step that show what a window of recent tokens is worth, for only whole blocks are recent.

    Returns:
        A quarter of the widest window; None where none keeps recent tokens: all at once.
    """
    recent = max((config.recent for config in configs), default=0)
    return max(1, recent // 4) if recent else None


def score_caches(
    model: nn.Module,
    tokens: NDArray[np.int32],
    configs: Sequence[NamedConfig],
    *,
    kept: LogitCache | None = None,
    progress: ProgressSink = ignore_progress,
) -> tuple[CacheNumbers, ...]:
    """Compare configurations with full-precision caches, all on the same windows.

    Args:
        model: In the form it runs in.
        tokens: int32 (W, T).
        configs: What to compare.
        kept: Logits of the reference for these windows. Empty: this model is the reference, and fills it.
            None: this model is the reference, and nobody else is compared with it.
        progress: Stage ``score``, one event per window and configuration.
    Returns:
        Numbers of the full-precision cache (divergence 0 where this model is the reference), then of each
        configuration in order.
    Raises:
        FingerprintMismatch: The reference has another number of logits.
    Cost: per window and configuration one forward; logits of the measured positions only.
    """
    rows: list[list[tuple[float, float, float, int]]] = [[] for _ in range(len(configs) + 1)]
    total, done = len(tokens) * (len(configs) + 1), 0
    block = block_of([named.config for named in configs])
    is_reference = kept is None or kept.vocab_size is None
    for number, window in enumerate(tokens):
        start = len(window) - measured_positions(len(window))
        own, nbytes = logits_behind(model, make_prompt_cache(model), window, start, block)
        if kept is not None and is_reference:
            kept.put(number, own)
        reference = own if kept is None or is_reference else _known(kept, number, own)
        rows[0].append((*_compare(reference, own, window), nbytes))
        done += 1
        for row, named in zip(rows[1:], configs, strict=True):
            detail = f"{len(window)} tokens, {named.label}"
            progress(Progress(stage="score", done=done, total=total, detail=detail))
            caches = build_caches(model, named.config)
            logits, nbytes = logits_behind(model, caches, window, start, block)
            row.append((*_compare(reference, logits, window), nbytes))
            del logits, caches
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


def logits_behind(
    model: nn.Module, caches: list[Any], window: NDArray[np.int32], start: int, block: int | None
) -> tuple[mx.array, int]:
    """Fill caches with a prefix, then run what is behind it; evaluates.

    Args:
        model: In the form it runs in.
        caches: Empty ones.
        window: int32 (T,).
        start: First position whose logits are wanted.
        block: Tokens per step from there on; None: all at once.
    Returns:
        Logits (T − start, V) float32, and the bytes of the caches at the end.
    """
    run: Any = model
    tokens = mx.array(window)[None]
    for chunk in range(0, start, _CHUNK):
        run(tokens[:, chunk : min(chunk + _CHUNK, start)], cache=caches)
        mx.eval([cache.state for cache in caches])
    parts = []
    step = block or len(window)
    for chunk in range(start, len(window), step):
        part = logits_of(run(tokens[:, chunk : chunk + step], cache=caches))
        parts.append(part[0].astype(mx.float32))
        mx.eval(parts[-1], [cache.state for cache in caches])
    nbytes = sum(cache.nbytes for cache in caches if not cache.empty())
    return mx.concatenate(parts), nbytes


def _known(kept: LogitCache, number: int, own: mx.array) -> mx.array:
    """The reference's logits of one window, of the same vocabulary."""
    reference = kept.get(number)
    require_vocabulary(own.shape[-1], reference.shape[-1])
    return reference


def _compare(reference: mx.array, logits: mx.array, window: NDArray[np.int32]) -> tuple[float, float, float]:
    """Divergence, agreement and negative log likelihood; means over the positions."""
    following = mx.array(window[-logits.shape[0] :])[None]
    return (
        float(np.asarray(kl_divergence(reference, logits)).mean(dtype=np.float64)),
        float(np.asarray(top1_agreement(reference, logits)).mean()),
        float(np.asarray(negative_log_likelihood(logits[None], following)).mean(dtype=np.float64)),
    )
