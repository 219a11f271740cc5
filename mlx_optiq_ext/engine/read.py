"""Reads single values of arrays that a step has evaluated, without waiting for the next step.

While the host looks at one step's results the next one is running already. A new operation on the same stream
would queue behind it; these run on the processor's own stream, where the array's memory can be seen as well.
"""

from typing import Any

import mlx.core as mx

__all__ = ["drawn_logprob", "most_likely"]


def drawn_logprob(logprobs: mx.array, token: int) -> float:
    """One log-probability.

    Args:
        logprobs: Evaluated, (V,), any float dtype.
    Evaluates one number.
    """
    value: Any = mx.take(logprobs, mx.array(token), stream=mx.cpu).item()
    return float(value)


def most_likely(logprobs: mx.array, count: int) -> list[tuple[int, float]]:
    """The most likely tokens with their log-probabilities, best first; impossible ones are left out.

    Args:
        logprobs: Evaluated, (V,), any float dtype.
    Evaluates.
    """
    count = min(count, logprobs.shape[0])
    if count < 1:
        return []
    with mx.stream(mx.cpu):
        tokens = mx.argpartition(-logprobs, kth=count - 1)[:count]
        values = logprobs[tokens].astype(mx.float32)
    found: tuple[Any, Any] = (tokens.tolist(), values.tolist())
    possible = [(token, value) for token, value in zip(*found, strict=True) if value > float("-inf")]
    return sorted(possible, key=lambda pair: (-pair[1], pair[0]))
