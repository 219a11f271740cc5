"""The losses of preference: sigmoid, conservative and IPO, against the base model itself.

The reference is the model with its adapter switched off, so there is no second one; what it says of every
answer is computed once, before training. Knows nothing of optimizers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.lora.batches import Batch, collate
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.masks import Pair
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["Judged", "JudgedBatch", "Preferring", "adapter_off", "judge_pairs", "preference_loss"]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A pair, and what the base model says of it."""

    pair: Pair
    reference: tuple[float, float]
    """Summed log-probability of the chosen and of the rejected answer."""


class JudgedBatch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """``P`` pairs: rows of the chosen answers, then of the rejected ones."""

    batch: Batch
    reference: NDArray[np.float32]
    """(2P,)"""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return self.batch.num_tokens

    @property
    def weight(self) -> int:
        """Number of pairs."""
        return len(self.reference) // 2


class Preferring:
    """A preference loss, each pair of an update with the same weight.

    Args:
        logprobs: Of the model that is trained.
        kind: See :func:`preference_loss`.
        beta: See :func:`preference_loss`.
        label_smoothing: See :func:`preference_loss`.
    """

    def __init__(
        self,
        logprobs: LogProbs,
        *,
        kind: Literal["sigmoid", "ipo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        self._logprobs = logprobs
        self._kind: Literal["sigmoid", "ipo"] = kind
        self._beta = beta
        self._label_smoothing = label_smoothing

    def length(self, item: Judged) -> int:
        """Tokens of the longer answer with its prompt."""
        return _length(item.pair)

    def where(self, item: Judged) -> str:
        """File and line of a pair."""
        return item.pair.where

    def collate(self, items: Sequence[Judged]) -> JudgedBatch:
        """All chosen answers, then all rejected ones."""
        reference = [[item.reference[side] for item in items] for side in (0, 1)]
        return JudgedBatch(
            batch=_collate_pairs([item.pair for item in items]),
            reference=np.array(reference, dtype=np.float32).reshape(-1),
        )

    def sums(self, batch: JudgedBatch) -> tuple[mx.array, dict[str, mx.array]]:
        """Summed loss, margin and rewards over the pairs, and how many are ordered rightly; lazy."""
        counts = mx.array(np.bincount(batch.batch.rows, minlength=len(batch.reference)))
        log_ratio = _by_row(self._logprobs(batch.batch), batch.batch) - mx.array(batch.reference)
        if self._kind == "ipo":
            log_ratio = log_ratio / counts
        chosen, rejected = log_ratio[: batch.weight], log_ratio[batch.weight :]
        losses = preference_loss(
            chosen - rejected, kind=self._kind, beta=self._beta, label_smoothing=self._label_smoothing
        )
        rewards = {"chosen_reward": self._beta * chosen, "rejected_reward": self._beta * rejected}
        values = {
            **rewards,
            "margin": self._beta * (chosen - rejected),
            "accuracy": (chosen > rejected).astype(mx.float32),
        }
        return mx.sum(losses), {name: mx.sum(mx.stop_gradient(value)) for name, value in values.items()}


def preference_loss(
    log_ratio: mx.array,
    *,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> mx.array:
    """Loss of every pair.

    Args:
        log_ratio: log(π/π_ref) of the chosen minus that of the rejected answer, (P,). Summed over tokens;
            for ``ipo`` the means per token, so that long answers do not weigh more.
        kind: ``sigmoid``: −log σ(β·ratio); ``ipo``: (ratio − 1/(2β))².
        beta: Strength of the tie to the reference.
        label_smoothing: Share of pairs taken to be labelled wrongly; conservative DPO, ``sigmoid`` only.
    Returns:
        (P,), lazy.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Mitchell 2023, "A note on DPO with noisy
        preferences", equation 3; Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    if kind == "ipo":
        return mx.square(log_ratio - 1 / (2 * beta))
    right, wrong = nn.log_sigmoid(beta * log_ratio), nn.log_sigmoid(-beta * log_ratio)
    smoothed: mx.array = -(1 - label_smoothing) * right - label_smoothing * wrong
    return smoothed


def judge_pairs(
    model: nn.Module,
    logprobs: LogProbs,
    pairs: Sequence[Pair],
    batch_size: int,
    progress: ProgressSink = ignore_progress,
) -> NDArray[np.float32]:
    """What the base model says of every answer; evaluates.

    Args:
        model: Has an adapter, which is switched off meanwhile.
        logprobs: Of the same model.
        pairs: Any number.
        batch_size: Pairs in one forward pass.
        progress: Told about every pair.
    Returns:
        (P, 2) summed log-probabilities of the chosen and the rejected answers.
    """
    order = sorted(range(len(pairs)), key=lambda index: _length(pairs[index]))
    judged = np.zeros((len(pairs), 2), dtype=np.float32)
    with adapter_off(model):
        for at in range(0, len(order), batch_size):
            members = order[at : at + batch_size]
            batch = _collate_pairs([pairs[index] for index in members])
            judged[members] = np.array(_by_row(logprobs(batch), batch)).reshape(2, -1).T
            progress(Progress(stage="reference", done=min(at + batch_size, len(order)), total=len(order)))
    return judged


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Make every adapted module compute what its base does, exactly; undone at the end."""
    adapted: list[Any] = [module for _, module in model.named_modules() if "lora_a" in module]
    scales = [module.scale for module in adapted]
    try:
        for module in adapted:
            module.scale = 0.0
        yield
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale


def _length(pair: Pair) -> int:
    return max(len(pair.chosen.tokens), len(pair.rejected.tokens))


def _collate_pairs(pairs: Sequence[Pair]) -> Batch:
    return collate([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)])


def _by_row(logprobs: mx.array, batch: Batch) -> mx.array:
    """Sum per row: (B,)."""
    return mx.zeros(batch.inputs.shape[0]).at[mx.array(batch.rows)].add(logprobs)
