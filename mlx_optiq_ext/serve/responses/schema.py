"""What ``/v1/responses`` takes: the fields this server acts on or says again; all others are ignored.

An item may leave out its ``type`` (a message, or a reference), so that all kinds of items share one Struct;
``to_generation`` asks for the fields that a kind needs. The same Struct is what the store keeps.

Source: OpenAI Responses API, and the requests that its clients send.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.serve.counts import TokenCount

__all__ = [
    "ContentPart",
    "InputTokensRequest",
    "Item",
    "NamedChoice",
    "ReasoningConfig",
    "ResponsesRequest",
    "TextConfig",
    "TextFormat",
    "Tool",
    "ToolFormat",
]


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a message, of a tool's output, or of reasoning."""

    type: Literal[
        "input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal", "input_image"
    ]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step of a conversation: a message, reasoning, a call or its output."""

    type: (
        Literal[
            "message",
            "reasoning",
            "function_call",
            "function_call_output",
            "custom_tool_call",
            "custom_tool_call_output",
            "item_reference",
        ]
        | None
    ) = None
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | list[ContentPart] | None = None


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The language that a custom tool reads."""

    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function, a custom tool or a namespace of them; other types run on servers that this is not."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    format: ToolFormat | None = None
    tools: "list[Tool] | None" = None


class NamedChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool that must be called, or those that may be."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: "list[NamedChoice] | None" = None


class ReasoningConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How hard to think, and whether to show it as a summary."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


ToolChoice: TypeAlias = Literal["auto", "none", "required"] | NamedChoice


class InputTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes the prompt: the body of ``/v1/responses/input_tokens``."""

    model: str | None = None
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    conversation: Any = None
    prompt: Any = None
    adapter: str | None = None


class ResponsesRequest(InputTokensRequest, frozen=True, kw_only=True):
    """The body of ``/v1/responses``."""

    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
