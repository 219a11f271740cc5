"""What the Anthropic dialect answers, as types for the API's description.

The documents themselves are written by ``from_events`` and ``errors``.
Source: Anthropic Messages API, version 2023-06-01.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

__all__ = ["AnthropicError", "MessageAnswer", "TokenCount"]


class SaidBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Words."""

    text: str


class ThoughtBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """Reasoning; empty with a signature where the client asked not to see it."""

    thinking: str
    signature: str


class CalledBlock(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ThinkingTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Of the answer."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a request took; those read from the prefix cache are apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[SaidBlock | ThoughtBlock | CalledBlock]
    stop_reason: Literal["end_turn", "stop_sequence", "max_tokens", "tool_use", "pause_turn"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/messages/count_tokens``."""

    input_tokens: int


class AnthropicErrorWords(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; the message names the field to blame."""

    type: str
    message: str
    details: dict[str, Any] | UnsetType = UNSET


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True):
    """Any error, with a status of 400 or above."""

    type: Literal["error"]
    error: AnthropicErrorWords
    request_id: str | None
