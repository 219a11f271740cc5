"""What a running job tells, in order; the one form that every dialect renders from.

A job's first event is ``Accepted`` or ``Failed``. Then come ``Started``, any number of ``Prefilled``, then
deltas; a tool call is ``ToolCallStart``, ``ToolCallDelta``s, ``ToolCallEnd`` with no other delta between; the
end is missing of a call in which the answer was cut. The last one is exactly one ``Finished`` or ``Failed``.
"""

import re
from collections.abc import Callable
from typing import Literal, Self, TypeAlias

import msgspec

from mlx_optiq_ext.errors import EngineError, OptiqError, PromptTooLong, RequestError

__all__ = [
    "Accepted",
    "Event",
    "EventSink",
    "Failed",
    "FinishReason",
    "Finished",
    "Prefilled",
    "ReasoningDelta",
    "Started",
    "TextDelta",
    "TokenLogprob",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallStart",
    "Usage",
]

FinishReason: TypeAlias = Literal["stop", "stop_sequence", "length", "tool_calls", "cancelled"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a job took."""

    prompt_tokens: int = 0
    """All of the prompt, cached ones included."""
    cached_tokens: int = 0
    """Of these, read from the prefix cache."""
    completion_tokens: int = 0
    """All that was generated, reasoning included."""
    reasoning_tokens: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One drawn token with its log-probability (nats) and the most likely ones."""

    token: str
    token_bytes: bytes
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """The prompt is rendered and fits; from here on the answer is a 200."""

    prompt_tokens: int
    model: str
    """Name of the model that answers, aliases resolved."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """Prefill begins."""

    cached_tokens: int


class Prefilled(msgspec.Struct, frozen=True, kw_only=True, tag="prefilled"):
    """Prompt tokens done, of all."""

    done: int
    total: int


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """More of the visible answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """More of what the model thinks."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallStart(msgspec.Struct, frozen=True, kw_only=True, tag="tool_start"):
    """A call begins; ``index`` counts the calls of the answer from 0."""

    index: int
    id: str
    """Unique, letters and digits only: ``call`` and 24 of them."""
    name: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True, tag="tool_delta"):
    """More of the call's arguments: the deltas concatenate to one JSON object."""

    index: int
    arguments: str


class ToolCallEnd(msgspec.Struct, frozen=True, kw_only=True, tag="tool_end"):
    """The call is complete; ``arguments`` is all of its deltas."""

    index: int
    id: str
    name: str
    arguments: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The answer is complete."""

    reason: FinishReason
    usage: Usage
    stop_sequence: str | None = None
    """The stop string that was met."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The job ended without an answer, or in the middle of it."""

    kind: str
    """Class name of the error, see :mod:`mlx_optiq_ext.errors`."""
    message: str
    status: int
    """HTTP status of an answer that has not begun."""
    retry_after_s: float | None = None
    param: str | None = None
    """Path of the field that is to blame, in the client's words where the request told them."""
    limit: int | None = None
    """Tokens of the context, of ``PromptTooLong``."""
    completion_tokens: int = 0
    """Generated before it failed."""

    @property
    def text(self) -> str:
        """The message, with the field to blame before it where it does not name it."""
        if self.param is None or re.search(rf"(?<![\w.]){re.escape(self.param)}(?!\w)", self.message):
            return self.message
        return f"{self.param}: {self.message}"

    @classmethod
    def of(cls, error: OptiqError) -> Self:
        """The event that tells of ``error``."""
        return cls(
            kind=type(error).__name__,
            message=str(error),
            status=error.status,
            retry_after_s=error.retry_after_s if isinstance(error, EngineError) else None,
            param=error.param if isinstance(error, RequestError) else None,
            limit=error.limit if isinstance(error, PromptTooLong) else None,
        )


Event: TypeAlias = (
    Accepted
    | Started
    | Prefilled
    | TextDelta
    | ReasoningDelta
    | ToolCallStart
    | ToolCallDelta
    | ToolCallEnd
    | Finished
    | Failed
)
EventSink: TypeAlias = Callable[[Event], None]
