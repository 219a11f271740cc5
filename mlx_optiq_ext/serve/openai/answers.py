"""What the OpenAI dialect answers, as types for the API's description; fields that may be missing are unset.

The documents themselves are written by ``from_events``, ``completions``, ``embeddings`` and ``serve.models``.
Source: OpenAI API reference, "Chat completions", "Completions", "Embeddings", "Models", "Error codes".
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "ChatCompletion",
    "EmbeddingList",
    "ModelPage",
    "ModelRow",
    "OpenAIError",
    "TextCompletion",
]


class CachedTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Of the prompt."""

    cached_tokens: int


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Of the answer."""

    reasoning_tokens: int


class TokenUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class TokenChance(msgspec.Struct, frozen=True, kw_only=True):
    """A token with its log-probability, and the most likely ones where it is that of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: "list[TokenChance] | UnsetType" = UNSET


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of every token of the answer."""

    content: list[TokenChance]


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments are a JSON object, as text."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says, thinks and calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage


class TextLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of every token of a text; offsets count characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokenUsage


class EmbeddingRow(msgspec.Struct, frozen=True, kw_only=True):
    """A vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/embeddings``."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: EmbeddingUsage


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A model, or an adapter on it; lengths are unset while the model is not loaded."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["model"]
    display_name: str
    created_at: str
    max_model_len: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET
    max_input_tokens: int | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    """For clients of the Anthropic dialect only."""
    parent: str | UnsetType = UNSET
    """Of an adapter."""


class ModelPage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelRow]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ErrorWords(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; ``param`` is the path of the field to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(msgspec.Struct, frozen=True, kw_only=True):
    """Any error, with a status of 400 or above."""

    error: ErrorWords
