"""What the Responses dialect answers, as types for the API's description.

The documents themselves are written by ``document``, ``from_events`` and ``pages``.
Source: OpenAI Responses API, "The response object"; Open Responses specification.
"""

from typing import Any, Literal

import msgspec

from mlx_optiq_ext.serve.responses.schema import Item

__all__ = ["DeletedResponse", "InputTokens", "ItemPage", "ResponseObject"]


class CachedInput(msgspec.Struct, frozen=True, kw_only=True):
    """Of the prompt."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Of the answer."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a request took."""

    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: ReasoningOutput
    total_tokens: int


class ResponseFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/responses``; what was asked is said again."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: int | None
    conversation: None
    error: ResponseFailure | None
    frequency_penalty: float
    incomplete_details: dict[str, str | None] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt: None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/responses/input_tokens``."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer where a stored response was forgotten."""

    id: str
    object: Literal["response"]
    deleted: bool


class ItemPage(msgspec.Struct, frozen=True, kw_only=True):
    """Items that a stored response's request brought."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
