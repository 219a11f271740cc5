"""The loss of imitation: cross entropy of the learnt tokens."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_optiq_ext.lora.batches import Batch, collate
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.masks import Sample

__all__ = ["Imitation"]


class Imitation:
    """Cross entropy in nats, each learnt token of an update with the same weight.

    Args:
        logprobs: Of the model that is trained.
    """

    def __init__(self, logprobs: LogProbs) -> None:
        self._logprobs = logprobs

    def length(self, item: Sample) -> int:
        """Tokens of a sample."""
        return len(item.tokens)

    def where(self, item: Sample) -> str:
        """File and line of a sample."""
        return item.where

    def collate(self, items: Sequence[Sample]) -> Batch:
        """One row per sample; its weight is the number of learnt tokens."""
        return collate(items)

    def sums(self, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """−Σ log p of the learnt tokens, lazy."""
        return -mx.sum(self._logprobs(batch)), {}
