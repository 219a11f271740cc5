"""Masks one row's logits so that its answer stays within a grammar and its reasoning within a budget.

Runs on the owner thread, once per step and row. What it follows are token ids; it knows no text.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.engine.reasoning import ReasoningTrack, matched
from mlx_optiq_ext.errors import RequestError

__all__ = ["Steering"]


class Steering:
    """A processor of logits.

    While nothing is to be decided it passes logits on without looking, so that steps stay queued ahead of the
    host. A grammar has to know the last token before it can say what may come next: then the host waits for
    that token, starts the forward pass of all rows, and computes its mask meanwhile.

    Args:
        track: Of the row's reasoning.
        matcher: llguidance's, at the beginning of its grammar; None: what follows reasoning is free.
        ends: Tokens that end the turn; not before reasoning is over, where a grammar follows.
        banned: A sequence of tokens that never becomes complete.
    """

    def __init__(
        self, track: ReasoningTrack, matcher: Any, *, ends: Sequence[int], banned: tuple[int, ...] = ()
    ) -> None:
        self._track = track
        self._matcher = matcher
        self._in_grammar = matcher is not None
        """So far the answer fits the grammar, even if it may turn out to open reasoning."""
        self._ends = list(ends)
        self._is_over = False
        """The turn was ended; the row is computed on until the host has seen that."""
        self._banned = banned
        self._spelled = 0
        """Tokens of the banned sequence that the answer ends with."""
        self._seen = 0
        self._prompt: int | None = None
        self._bans: dict[str, mx.array] = {}

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask what must not come next.

        Args:
            tokens: Prompt and answer so far, (T,); the first call's are the prompt.
            logits: (1, V).
        Raises:
            RequestError: The grammar cannot go on; only then.
        """
        num_tokens = int(tokens.shape[0])
        if self._prompt is None:
            self._prompt = self._seen = num_tokens
        if self._must_look(num_tokens):
            new: Any = tokens[self._seen :].tolist()
            for token in new:
                self._feed(token)
            self._seen = num_tokens
            logits = self._mask(logits)
        if self._banned and self._spelled == len(self._banned) - 1:
            logits = self._ban("banned", [self._banned[-1]], logits)
        return logits

    def _must_look(self, num_tokens: int) -> bool:
        if self._matcher is not None or len(self._banned) > 1:
            return True
        left = self._track.left
        return left is not None and num_tokens - self._seen >= left

    def _feed(self, token: int) -> None:
        if self._banned:
            self._spelled = matched(self._banned, self._spelled, token)
        before = self._track.state
        self._track.feed(token)
        if self._matcher is None or before == "inside":
            return
        if self._track.state == "inside":
            self._matcher.reset()
            self._in_grammar = True
        elif token in self._ends:
            self._is_over = True
        elif self._in_grammar:
            if self._track.state == "before" and not self._matcher.validate_tokens([token]):
                self._in_grammar = False
                return
            self._matcher.consume_token(token)

    def _mask(self, logits: mx.array) -> mx.array:
        forced = self._track.forced
        if forced is not None:
            return _only(forced, logits)
        if self._matcher is None or self._is_over:
            return logits
        if self._track.state == "inside":
            return self._ban("ends", self._ends, logits)
        # The forward pass runs while the mask is computed.
        mx.async_eval(logits)
        bits = self._allowed(logits.shape[-1])
        opening = self._track.opening
        if opening is not None:
            bits[opening // 32] |= np.uint32(1 << (opening % 32))
        return _within(bits, logits)

    def _allowed(self, vocab_size: int) -> npt.NDArray[np.uint32]:
        """Bits of the tokens that the grammar allows."""
        if not self._in_grammar:
            return np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        # A matcher that fails while it computes allows the end of the turn and says why only afterwards.
        mask = b"" if self._matcher.get_error() else self._matcher.compute_bitmask()
        error = self._matcher.get_error()
        if error:
            raise RequestError(f"the answer cannot go on within its grammar: {error.splitlines()[0]}")
        bits = np.frombuffer(mask, dtype=np.uint32).copy()
        if not bits.any():
            raise RequestError("the answer cannot go on within its grammar: no token fits")
        return bits

    def _ban(self, name: str, tokens: list[int], logits: mx.array) -> mx.array:
        if name not in self._bans:
            self._bans[name] = mx.array(tokens)[None]
        least = mx.array(-mx.inf, dtype=logits.dtype)
        return mx.put_along_axis(logits, self._bans[name], least, axis=-1)


def _only(token: int, logits: mx.array) -> mx.array:
    """Logits of which one token is all that can be drawn."""
    place = mx.arange(logits.shape[-1]) == token
    return mx.where(place, mx.array(0, dtype=logits.dtype), mx.array(-mx.inf, dtype=logits.dtype))[None]


def _within(bits: npt.NDArray[np.uint32], logits: mx.array) -> mx.array:
    """Logits with -inf where a token's bit is not set."""
    words = mx.array(bits)
    allowed = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1)[: logits.shape[-1]]
    return mx.where(allowed.astype(mx.bool_), logits, mx.array(-mx.inf, dtype=logits.dtype))
