"""Compare candidate storages of a KV cache on held-out text, and accept one.

Called by ``kv_cache``; knows candidates and scores, not how either was made.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.eval.kv_score import CacheNumbers, NamedConfig, score_caches
from mlx_optiq_ext.kv.allocate import CacheCandidate
from mlx_optiq_ext.measure.intervals import Estimate, estimate_mean
from mlx_optiq_ext.measure.sessions import Sessions
from mlx_optiq_ext.types.figures import FEWEST_WINDOWS, number_text, plus_minus
from mlx_optiq_ext.types.kv import KVConfig, KVScore
from mlx_optiq_ext.types.progress import ProgressSink
from mlx_optiq_ext.types.quant import KEEP

__all__ = ["Scored", "Verdict", "accept", "compare_candidates", "estimate_note", "loss_notes"]

_LARGE_DIVERGENCE = 0.2
"""Nats per token from which a storage is said to change what the model writes."""


class Scored(NamedTuple):
    """One candidate on held-out windows."""

    candidate: CacheCandidate
    config: KVConfig
    numbers: tuple[CacheNumbers, ...]
    """Per length."""

    @property
    def windows(self) -> NDArray[np.float64]:
        """Divergence of every window of every length."""
        return np.concatenate([entry.divergence for entry in self.numbers])

    @property
    def lengths(self) -> NDArray[np.intp]:
        """Index of the length of every window."""
        return np.repeat(np.arange(len(self.numbers)), [len(entry.divergence) for entry in self.numbers])

    @property
    def divergence(self) -> Estimate:
        """Mean over the lengths."""
        return estimate_mean(self.windows, self.lengths)

    def minus(self, other: "Scored") -> Estimate:
        """How much more it diverges than another one, paired by window."""
        return estimate_mean(self.windows - other.windows, self.lengths)

    def score(self) -> KVScore:
        """For the table."""
        found = self.divergence
        return KVScore(
            label=self.candidate.label,
            bits_per_number=self.candidate.bits_per_number,
            divergence=found.mean,
            stderr=found.stderr,
            half_width=found.half_width,
            num_windows=found.num_windows,
            by_length=tuple(float(entry.divergence.mean()) for entry in self.numbers),
            top1=float(np.mean([entry.top1.mean() for entry in self.numbers])),
        )


class Verdict(NamedTuple):
    """The candidate to ship, and why."""

    accepted: Scored
    reason: str


def compare_candidates(
    model: nn.Module,
    found: Sequence[CacheCandidate],
    configs: Sequence[KVConfig],
    held_out: Sessions,
    progress: ProgressSink,
) -> tuple[Scored, ...]:
    """Run candidates with real caches on text that nothing was measured on.

    All run on every other window; those that are then worse than the best of their kind (per layer, or
    uniform) by more than the 95 % interval of the paired difference run no further.

    Returns:
        Those that ran on all windows, best first; the best of each kind is among them.
    """
    parts = [
        {length: tokens[start::2] for length, tokens in held_out.windows.items() if len(tokens) > start}
        for start in (0, 1)
    ]
    running = [Scored(c, config, ()) for c, config in zip(found, configs, strict=True)]
    first = _run(model, running, parts[0], progress)
    kept = [k for k, entry in enumerate(first) if not _is_clearly_worse(entry, first)]
    rest = _run(model, [running[k] for k in kept], parts[1], progress)
    whole = [_joined(first[k], more, held_out, parts[1]) for k, more in zip(kept, rest, strict=True)]
    return tuple(sorted(whole, key=lambda entry: entry.divergence.mean))


def _run(
    model: nn.Module,
    entries: Sequence[Scored],
    windows: dict[int, NDArray[np.int32]],
    progress: ProgressSink,
) -> list[Scored]:
    named = [NamedConfig(entry.candidate.label, entry.config) for entry in entries]
    runs = [score_caches(model, tokens, named, progress=progress)[1:] for tokens in windows.values()]
    return [entry._replace(numbers=tuple(run[k] for run in runs)) for k, entry in enumerate(entries)]


def _is_clearly_worse(entry: Scored, all_entries: Sequence[Scored]) -> bool:
    kind = [other for other in all_entries if other.candidate.is_uniform == entry.candidate.is_uniform]
    difference = entry.minus(min(kind, key=lambda other: other.divergence.mean))
    return difference.num_windows >= FEWEST_WINDOWS and difference.low > 0


def _joined(first: Scored, rest: Scored, held_out: Sessions, part: dict[int, NDArray[np.int32]]) -> Scored:
    """Both parts of every length; a length of one window is in the first alone."""
    more = dict(zip(part, rest.numbers, strict=True))
    numbers = (
        CacheNumbers(
            np.concatenate([one.divergence, more[length].divergence]),
            np.concatenate([one.top1, more[length].top1]),
            np.concatenate([one.nll, more[length].nll]),
            one.nbytes,
        )
        if length in more
        else one
        for length, one in zip(held_out.windows, first.numbers, strict=True)
    )
    return first._replace(numbers=tuple(numbers))


def accept(scored: Sequence[Scored]) -> Verdict:
    """The candidate to ship: a per-layer one only where its divergence is below that of every uniform pair.

    Args:
        scored: Best first, as :func:`compare_candidates` gives them.
    """
    pair = next((entry for entry in scored if entry.candidate.is_uniform), None)
    best = next((entry for entry in scored if not entry.candidate.is_uniform), None)
    if best is None:
        assert pair is not None
        return Verdict(pair, f"{pair.candidate.label}: allocating per layer gives the same")
    if pair is None:
        return Verdict(best, f"{best.candidate.label}: no uniform pair fits the budget")
    if not pair.divergence.mean:
        return Verdict(pair, f"{pair.candidate.label}: no divergence at all")
    difference = best.minus(pair)
    compared = _compared(difference, best.divergence.mean / pair.divergence.mean)
    if difference.mean < 0:
        reason = (
            f"{best.candidate.label} instead of {pair.candidate.label}, the best uniform pair: {compared}"
        )
        return Verdict(best, reason)
    return Verdict(
        pair, f"{pair.candidate.label}; {best.candidate.label} has no lower divergence: {compared}"
    )


def _compared(difference: Estimate, ratio: float) -> str:
    """A paired difference in words, and whether its interval excludes zero."""
    times = f"{number_text(ratio)} × its divergence"
    if difference.num_windows < FEWEST_WINDOWS:
        windows = f"{difference.num_windows} window{'s' if difference.num_windows > 1 else ''}"
        return f"{times}; {windows} cannot tell whether by chance"
    paired = f"{times}, difference {plus_minus(difference.mean, difference.half_width)}"
    if difference.low > 0 or difference.high < 0:
        return f"{paired}: {'worse' if difference.mean > 0 else 'better'}"
    lower = ", only its mean is lower" if difference.mean < 0 else ""
    return f"{paired}: not distinguishable{lower}"


def loss_notes(accepted: CacheCandidate, score: KVScore) -> tuple[str, ...]:
    """Say where nothing is saved, and where what is saved costs much."""
    if all(choice == KEEP for choice in accepted.choices.values()):
        return (
            "nothing is saved: every cache stays in full precision within this budget; lower --target-bits",
        )
    if score.divergence < _LARGE_DIVERGENCE:
        return ()
    return (
        f"a divergence of {score.divergence:.2g} nats is large: what the model would write becomes "
        f"{math.exp(score.divergence):.2g} times less likely with every token, and another token is the "
        f"likeliest at {1 - score.top1:.0%} of positions; raise --target-bits for better text",
    )


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
