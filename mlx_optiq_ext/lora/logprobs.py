"""Log-probabilities of the learnt tokens, with logits of a few of them at a time.

Only positions that are learnt reach the output head, in chunks that are computed again in the backward pass:
long sequences and large vocabularies never have all their logits in memory. The trunk of a model (all but
head, soft cap and scale) is the module that holds its blocks; between two calls of the model its output is
kept and handed back piece by piece. Called by the losses.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_optiq_ext.lora.batches import Batch
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.tape import logits_of

__all__ = ["LogProbs"]

_CHUNK_FLOATS = 1 << 24
"""Logits held at once."""


class LogProbs:
    """Scores the learnt tokens of batches.

    Args:
        model: Any family that mlx-lm runs; one without a trunk of its own gets all its logits at once.
        chunk_floats: Logits (tokens × vocabulary) held at once.
    """

    def __init__(self, model: nn.Module, *, chunk_floats: int = _CHUNK_FLOATS) -> None:
        self._model: Any = model
        self._blocks = find_blocks(model)
        trunk = self._blocks.prefix.rpartition(".")[0]
        self._trunk = dict(model.named_modules())[trunk] if trunk else None
        self._chunk_floats = chunk_floats
        self._vocab = 0

    def __call__(self, batch: Batch) -> mx.array:
        """Log-probability of every learnt token: (N,) float32, lazy."""
        inputs, positions = mx.array(batch.inputs), mx.array(batch.positions)
        targets = mx.array(batch.targets)
        hidden = self._hidden(inputs) if self._trunk is not None else None
        if hidden is None:
            logits = logits_of(self._model(inputs))
            return _chosen(logits.reshape(-1, logits.shape[-1])[positions], targets)
        h = hidden.reshape(-1, hidden.shape[-1])[positions]
        step = max(1, self._chunk_floats // self._vocab)
        if h.shape[0] <= step:
            return _chosen(self._head(h), targets)
        pieces = [
            self._again(h[at : at + step], targets[at : at + step]) for at in range(0, h.shape[0], step)
        ]
        return mx.concatenate(pieces)

    def _hidden(self, inputs: mx.array) -> mx.array | None:
        """What the trunk gives for tokens (B, T): (B, T, D); None where it gives something else."""
        noted: list[Any] = []

        def note(_: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            noted.append(original(*args, **kwargs))
            is_plain = isinstance(noted[-1], mx.array) and noted[-1].shape[:2] == inputs.shape
            return noted[-1][:, :1] if is_plain else noted[-1]

        assert self._trunk is not None
        with intercepted([self._trunk], note):
            logits = logits_of(self._model(inputs))
        is_plain = len(noted) == 1 and isinstance(noted[0], mx.array) and noted[0].shape[:2] == inputs.shape
        # A model that does more around its trunk than to each position by itself would not end up here.
        if not is_plain or logits.shape[:2] != (inputs.shape[0], 1):
            return None
        self._vocab = int(logits.shape[-1])
        return noted[0]  # type: ignore[no-any-return]

    def _head(self, h: mx.array) -> mx.array:
        """Logits (n, V) of trunk outputs (n, D)."""
        with intercepted([self._trunk], lambda *_: h[None]):  # type: ignore[list-item]
            return logits_of(self._model(mx.zeros((1, h.shape[0]), dtype=mx.int32)))[0]

    def _again(self, h: mx.array, targets: mx.array) -> mx.array:
        """The same, computed again in the backward pass in place of keeping its logits."""

        def scored(trained: Any, h: mx.array) -> mx.array:
            self._model.update(trained)
            return _chosen(self._head(h), targets)

        outside = [
            (path, array)
            for path, array in named_arrays(self._model.trainable_parameters())
            if self._blocks.index_of(path) is None
        ]
        return mx.checkpoint(scored)(tree_unflatten(outside), h)


def _chosen(logits: mx.array, targets: mx.array) -> mx.array:
    """log softmax (n, V) at the targets: (n,)."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return picked - mx.logsumexp(logits, axis=-1)
