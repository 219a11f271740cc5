"""Compare candidate storages of a KV cache on held-out text, and accept one.

Called by ``kv_cache``; knows candidates and scores, not how either was made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.eval.kv_score import CacheNumbers, NamedConfig, score_caches
from mlx_optiq_ext.kv.allocate import CacheCandidate
from mlx_optiq_ext.measure.intervals import estimate_mean, paired_ratio
from mlx_optiq_ext.measure.sessions import Sessions
from mlx_optiq_ext.types.kv import KVConfig, KVScore
from mlx_optiq_ext.types.progress import ProgressSink

__all__ = ["ScoredCandidates", "accept", "compare_candidates", "estimate_note"]


class ScoredCandidates(NamedTuple):
    """Candidates on the held-out text, in their order."""

    scores: list[KVScore]
    windows: list[NDArray[np.float64]]
    """Divergence of every window of every length."""
    lengths: NDArray[np.int32]
    """Index of the length of every window."""


def compare_candidates(
    model: nn.Module,
    found: Sequence[CacheCandidate],
    configs: Sequence[KVConfig],
    held_out: Sessions,
    progress: ProgressSink,
) -> ScoredCandidates:
    """Run every candidate with real caches on text that nothing was measured on."""
    if not held_out.windows:
        raise MeasurementError(f"no candidate can be compared: {'; '.join(held_out.info.notes)}")
    named = [NamedConfig(c.label, config) for c, config in zip(found, configs, strict=True)]
    runs = [score_caches(model, tokens, named, progress=progress)[1:] for tokens in held_out.windows.values()]
    lengths = np.repeat(np.arange(len(runs)), [len(tokens) for tokens in held_out.windows.values()])
    scores, windows = [], []
    for k, candidate in enumerate(found):
        numbers: list[CacheNumbers] = [run[k] for run in runs]
        divergences = np.concatenate([entry.divergence for entry in numbers])
        estimate = estimate_mean(divergences, lengths)
        scores.append(
            KVScore(
                label=candidate.label,
                bits_per_number=candidate.bits_per_number,
                divergence=estimate.mean,
                stderr=estimate.stderr,
                by_length=tuple(float(entry.divergence.mean()) for entry in numbers),
                top1=float(np.mean([entry.top1.mean() for entry in numbers])),
            )
        )
        windows.append(divergences)
    return ScoredCandidates(scores, windows, lengths.astype(np.int32))


def accept(found: Sequence[CacheCandidate], scored: ScoredCandidates) -> tuple[int, str]:
    """The candidate to ship: a per-layer one only where it beats the best uniform pair."""
    means = [score.divergence for score in scored.scores]
    uniform = [k for k, candidate in enumerate(found) if candidate.is_uniform]
    layered = [k for k, candidate in enumerate(found) if not candidate.is_uniform]
    if not layered:
        pair = min(uniform, key=lambda k: means[k])
        return pair, f"{found[pair].label}: allocating per layer gives the same"
    best = min(layered, key=lambda k: means[k])
    if not uniform:
        return best, f"{found[best].label}: no uniform pair fits the budget"
    pair = min(uniform, key=lambda k: means[k])
    if not means[pair]:
        return pair, f"{found[pair].label}: no divergence at all"
    ratio = paired_ratio(scored.windows[best], scored.windows[pair], scored.lengths)
    compared = f"{ratio.mean:.2f} × ({max(ratio.low, 0):.2f} to {ratio.high:.2f})"
    if means[best] < means[pair]:
        return best, f"{found[best].label}: {compared} the divergence of {found[pair].label}"
    return pair, f"{found[pair].label}: the best per-layer allocation has {compared} its divergence"


def estimate_note(accepted: CacheCandidate, score: KVScore) -> tuple[str, ...]:
    """Say where the summed estimates and the whole cache disagree."""
    ratio = score.divergence / accepted.predicted if accepted.predicted else 1.0
    if 0.5 <= ratio <= 2:
        return ()
    return (
        f"the whole cache diverges {ratio:.2g} times as much as the estimates add up to "
        f"({score.divergence:.3g} against {accepted.predicted:.3g}): the estimates miss something, "
        "such as experts that change hands; trust the comparison of whole caches",
    )
