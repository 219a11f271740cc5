"""From a request's sampling options to what mlx-lm calls per row: processors of logits, and a sampler.

Order: repetition, presence and frequency penalties and bias on the logits; then temperature, top-k, top-p and
min-p on the distribution that is left. Everything is lazy and of one row, so a row draws the same tokens
whatever else is in the batch. Arrays are built at the first call, on the thread that owns the model.
"""

import math
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.engine.guard import Processor, Sampler
from mlx_optiq_ext.engine.read import drawn_logprob, most_likely
from mlx_optiq_ext.engine.token_bytes import token_bytes
from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import Sampling
from mlx_optiq_ext.types.events import TokenLogprob

__all__ = ["make_processors", "make_sampler", "token_logprobs"]

_COLDEST = 1e-5
"""Below this temperature the most likely token is drawn."""


def make_sampler(sampling: Sampling) -> Sampler | None:
    """How a row draws its tokens; None where it takes the most likely one.

    Args:
        sampling: Options; what is None is off, the temperature 1.
    """
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    top_k = sampling.top_k or 0
    if temperature < _COLDEST or top_k == 1 or top_p <= 0:
        return None
    seed = sampling.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    return _Draw(temperature, top_k, top_p, sampling.min_p or 0.0, seed)


class _Draw:
    """Draws with its own chain of random keys."""

    def __init__(self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
        self._temperature, self._top_k, self._top_p, self._min_p = temperature, top_k, top_p, min_p
        self._seed = seed % 2**64
        self._key: mx.array | None = None

    def __call__(self, logprobs: mx.array) -> mx.array:
        if self._key is None:
            self._key = mx.random.key(self._seed)
        self._key, key = mx.random.split(self._key)
        scores = logprobs.astype(mx.float32) * (1.0 / self._temperature)
        tokens = None
        if 0 < self._top_k < scores.shape[-1]:
            tokens = mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[:, : self._top_k]
            scores = mx.take_along_axis(scores, tokens, axis=-1)
        if self._top_p < 1.0:
            scores = _nucleus(scores, self._top_p)
        if self._min_p > 0.0:
            least = mx.max(scores, axis=-1, keepdims=True) + math.log(self._min_p)
            scores = mx.where(scores < least, -mx.inf, scores)
        drawn = mx.random.categorical(scores, axis=-1, key=key)
        return drawn if tokens is None else mx.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


def _nucleus(scores: mx.array, top_p: float) -> mx.array:
    """Keep the most likely tokens up to and with the one that brings their mass to ``top_p``.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", equation 2.
    """
    falling = -mx.sort(-scores, axis=-1)
    mass = mx.cumsum(mx.softmax(falling, axis=-1), axis=-1, inclusive=False)
    kept = mx.maximum(mx.sum(mass < top_p, axis=-1, keepdims=True), 1)
    return mx.where(scores < mx.take_along_axis(falling, kept - 1, axis=-1), -mx.inf, scores)


def make_processors(sampling: Sampling, num_prompt_tokens: int, vocab_size: int) -> list[Processor]:
    """Penalties and bias of a row, in the order in which they apply; none that has no effect.

    Args:
        sampling: Options.
        num_prompt_tokens: Where the answer begins in the tokens that a processor sees.
        vocab_size: Width of the logits.
    Raises:
        RequestError: A biased token does not exist, a bias is not finite, a repetition penalty not positive.
    """
    processors: list[Processor] = []
    if sampling.repetition_penalty != 1.0:
        processors.append(_repetition(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_counted(sampling.presence_penalty, sampling.frequency_penalty, num_prompt_tokens))
    if sampling.logit_bias:
        processors.append(_bias(sampling.logit_bias, vocab_size))
    return processors


def _repetition(penalty: float) -> Processor:
    """Source: Keskar et al. 2019, "CTRL", section 4.1, sign-aware."""
    if not penalty > 0 or math.isinf(penalty):
        raise RequestError(f"repetition_penalty is {penalty}; it must be above 0", param="repetition_penalty")

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen = tokens[None]
        scores = mx.take_along_axis(logits, seen, axis=-1)
        scores = mx.where(scores < 0, scores * penalty, scores / penalty)
        return mx.put_along_axis(logits, seen, scores.astype(logits.dtype), axis=-1)

    return process


def _counted(presence: float, frequency: float, start: int) -> Processor:
    """Source: OpenAI API reference, "presence_penalty" and "frequency_penalty"."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.shape[0] <= start:
            return logits
        counts = mx.zeros(logits.shape[-1], dtype=mx.float32).at[tokens[start:]].add(1.0)
        penalty = frequency * counts + presence * (counts > 0)
        return logits - penalty.astype(logits.dtype)

    return process


def _bias(bias: dict[int, float], vocab_size: int) -> Processor:
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias names token {token}; the model has 0 to {vocab_size - 1}", param="logit_bias"
            )
        if not math.isfinite(value):
            raise RequestError(
                f"logit_bias of token {token} is {value}; it must be finite", param="logit_bias"
            )
    ids, values = list(bias), list(bias.values())
    arrays: list[mx.array] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:  # noqa: ARG001
        if not arrays:
            arrays.extend((mx.array(ids), mx.array(values)))
        return logits.at[:, arrays[0]].add(arrays[1].astype(logits.dtype))

    return process


def token_logprobs(logprobs: mx.array, token: int, top: int, tokenizer: Any) -> TokenLogprob:
    """The drawn token's log-probability and the most likely ones beside it.

    Args:
        logprobs: Evaluated, (V,): after penalties, bias and constraint, before the temperature.
        token: As drawn.
        top: How many likely ones; impossible ones are left out.
        tokenizer: Of the model.
    Evaluates.
    """
    found = [(token, drawn_logprob(logprobs, token)), *most_likely(logprobs, top)]
    spelled = token_bytes(tokenizer, [each for each, _ in found])
    drawn, *likely = (
        TokenLogprob(token=word.decode("utf-8", "replace"), token_bytes=word, logprob=value)
        for word, (_, value) in zip(spelled, found, strict=True)
    )
    return TokenLogprob(
        token=drawn.token, token_bytes=drawn.token_bytes, logprob=drawn.logprob, top=tuple(likely)
    )
