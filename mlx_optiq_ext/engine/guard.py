"""What keeps one row's failure from being every row's.

mlx-lm calls processors and samplers of all rows inside one step: an exception in one of them would end the
step for everybody. Knows nothing of what it wraps; the engine asks :attr:`RowGuard.error` after each step.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import mlx.core as mx

from mlx_optiq_ext.engine.read import drawn_logprob
from mlx_optiq_ext.errors import EngineError

__all__ = ["Processor", "RowGuard", "Sampler"]

Processor: TypeAlias = Callable[[mx.array, mx.array], mx.array]
"""``processor(tokens (T,), logits (1, V)) -> logits``, lazy; tokens are the prompt and the answer so far."""
Sampler: TypeAlias = Callable[[mx.array], mx.array]
"""``sampler(logprobs (1, V)) -> token (1,)``, lazy."""


class RowGuard:
    """Remembers the first error of a row and lets its logits pass unchanged from then on.

    ::

        guard = RowGuard()
        insert(samplers=[guard.sampler(draw)], logits_processors=[[guard.processor(each) for each in ...]])
        ... a step ...
        guard.check(response.token, response.logprobs)
        if guard.error is not None: end this row
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def processor(self, process: Processor) -> Processor:
        """Wrap a processor."""

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            if self.error is not None:
                return logits
            try:
                return process(tokens, logits)
            except Exception as error:  # noqa: BLE001 - reported by the engine, which ends the row with it
                self.error = error
                return logits

        return guarded

    def sampler(self, draw: Sampler) -> Sampler:
        """Wrap a sampler; a row that failed goes on greedily until it is taken out."""

        def guarded(logprobs: mx.array) -> mx.array:
            if self.error is None:
                try:
                    return draw(logprobs)
                except Exception as error:  # noqa: BLE001 - as above
                    self.error = error
            return mx.argmax(logprobs, axis=-1)

        return guarded

    def check(self, token: int, logprobs: mx.array) -> None:
        """Note a token that was drawn from logits which are not numbers.

        One NaN or +inf among a row's logits, or none that is finite, makes the log-probability of whatever
        is drawn not finite.

        Args:
            token: As drawn.
            logprobs: Evaluated, (V,), of the same step.
        """
        if self.error is None and not math.isfinite(drawn_logprob(logprobs, token)):
            self.error = EngineError("the model's output is not finite: no token can be drawn from it")
