"""What clients of the OpenAI dialect send; unknown fields are ignored, wrong types are errors.

Source: OpenAI API reference (chat completions, completions, embeddings); `top_k`, `min_p`,
`repetition_penalty`, `guided_*`, `chat_template_kwargs` and `reasoning_content` as other local servers and
their clients spell them.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from mlx_optiq_ext.serve.counts import TokenCount, TopK

__all__ = [
    "MAX_STOPS",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "EmbeddingRequest",
    "FunctionTool",
    "ImagePart",
    "NamedChoice",
    "RefusalPart",
    "SamplingFields",
    "TextPart",
    "ToolDefinition",
]

MAX_STOPS = 16

_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class TextPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Words."""

    text: str


class RefusalPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    """An earlier refusal of the model."""

    refusal: str


class ImageUrl(msgspec.Struct, frozen=True, kw_only=True):
    """Where a picture is."""

    url: str


class ImagePart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="image_url"):
    """A picture."""

    image_url: ImageUrl | str


ContentPart: TypeAlias = TextPart | RefusalPart | ImagePart


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """Name and arguments of an earlier call."""

    name: _Name
    arguments: str | dict[str, Any] = ""


class MessageToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier call."""

    function: FunctionCall
    id: str = ""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A tool; kinds other than functions are ignored."""

    type: str = "function"
    function: FunctionTool | None = None


class FunctionName(msgspec.Struct, frozen=True, kw_only=True):
    """A function by its name."""

    name: str


class AllowedTool(msgspec.Struct, frozen=True, kw_only=True):
    """One of the tools that may be called."""

    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the tools, and whether one of them must be called."""

    tools: list[AllowedTool]
    mode: Literal["auto", "required"] = "auto"


class NamedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that must be called, or the tools that may be."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A schema with its name."""

    schema: dict[str, Any] | bool
    name: str = ""


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the visible answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that chat and legacy completions have in common."""

    model: str = ""
    adapter: str | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: _Seed | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: _Fraction | None = None
    top_k: TopK | None = None
    min_p: _Fraction | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    max_tokens: TokenCount | None = None
    response_format: ResponseFormat | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/embeddings``."""

    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1, max_length=2048)]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
