"""One vector per text from a language model: the mean of its last hidden states.

Knows nothing of requests. Called on the owner thread; evaluates.
"""

from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.errors import RequestError, UnsupportedModel
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import intercepted

__all__ = ["embed", "embed_in_pieces", "groups"]

_ROWS = 8
_TOGETHER = 4096
"""Tokens of inputs that are computed together: what their caches take."""
_STEP = 512
"""Tokens of one piece, over all rows."""


def embed(model: nn.Module, inputs: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """All of :func:`embed_in_pieces` at once."""
    work = embed_in_pieces(model, inputs)
    while True:
        try:
            next(work)
        except StopIteration as done:
            vectors: tuple[tuple[float, ...], ...] = done.value
            return vectors


def embed_in_pieces(
    model: nn.Module, inputs: Sequence[Sequence[int]]
) -> Generator[None, None, tuple[tuple[float, ...], ...]]:
    """Mean of what the output head is given, over all tokens of an input, of unit length.

    Yields after every 512 tokens.

    Args:
        model: Evaluated, any family that mlx-lm runs.
        inputs: Token ids of each input.
    Returns:
        D numbers per input, computed in float32, in the order of the inputs.
    Raises:
        RequestError: An input is empty.
        UnsupportedModel: The model has no output head of its own.
    Cost: KV caches of 4096 tokens, or of one longer input; hidden states of 512 tokens.
    """
    for index, tokens in enumerate(inputs):
        if not len(tokens):
            raise RequestError(f"input {index} has no tokens: there is nothing to embed", param="input")
    head = _Head(model)
    vectors: dict[int, tuple[float, ...]] = {}
    for group in groups([len(tokens) for tokens in inputs]):
        means = yield from _means(model, head, [inputs[index] for index in group])
        vectors.update(zip(group, map(tuple, means.tolist()), strict=True))
        mx.clear_cache()
    return tuple(vectors[index] for index in range(len(inputs)))


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Places of inputs that are computed together, of like length: what is padded is computed for nothing.

    Args:
        lengths: Tokens of each input.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        last = groups[-1] if groups else []
        if last and len(last) < _ROWS and (len(last) + 1) * lengths[index] <= _TOGETHER:
            last.append(index)
        else:
            groups.append([index])
    return groups


def _means(
    model: nn.Module, head: "_Head", rows: list[Sequence[int]]
) -> Generator[None, None, npt.NDArray[np.float32]]:
    """Unit vectors of a few inputs, padded at the right: what comes later cannot change what came before."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), dtype=np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    cache = make_prompt_cache(model)
    total = mx.array(0.0)
    width = max(1, _STEP // len(rows))
    for at in range(0, padded.shape[1], width):
        step = padded[:, at : at + width]
        is_real = mx.array(np.arange(at, at + step.shape[1]) < lengths[:, None])
        hidden = head.inputs(mx.array(step), cache).astype(mx.float32)
        total = total + mx.sum(mx.where(is_real[..., None], hidden, 0.0), axis=1)
        mx.eval(total, [each.state for each in cache if not each.empty()])
        yield
    mean = total / mx.array(lengths[:, None])
    return np.array(mean / mx.maximum(mx.linalg.norm(mean, axis=-1, keepdims=True), 1e-12))


class _Head:
    """What stands behind the blocks of a model and makes logits of hidden states."""

    def __init__(self, model: nn.Module) -> None:
        blocks = find_blocks(model)
        self._model: Any = model
        self._modules = [
            module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding)
            and blocks.index_of(path) is None
        ]

    def inputs(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Hidden states that the head is given for tokens (B, T): (B, T, D), lazy.

        Raises:
            UnsupportedModel: No head was called.
        """
        noted: list[mx.array] = []

        def note(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            as_head = kwargs.pop("_as_linear", False)
            if as_head or not isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
                noted.append(args[0])
            return original(*args, **kwargs)

        # Logits are never evaluated, so they cost nothing.
        with intercepted(self._modules, note):
            self._model(tokens, cache=cache)
        if not noted or noted[-1].shape[:2] != tokens.shape:
            raise UnsupportedModel(
                f"{type(self._model).__module__} has no output head whose input could be embedded"
            )
        return noted[-1]
