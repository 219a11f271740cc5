"""What ``/v1/messages`` takes: the fields this server acts on; all others are ignored.

Types are checked while decoding, so that an error names the field's path. Read by ``to_generation``.

Source: Anthropic Messages API, version 2023-06-01, and the requests that its clients send.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.serve.counts import MOST_TOKENS, TokenCount

__all__ = [
    "Block",
    "CountTokensRequest",
    "DocumentBlock",
    "ImageBlock",
    "ImageSource",
    "JSONFormat",
    "Message",
    "MessagesRequest",
    "Metadata",
    "OutputConfig",
    "RedactedThinkingBlock",
    "ResultBlock",
    "SearchResultBlock",
    "TextBlock",
    "TextSource",
    "ThinkingBlock",
    "ThinkingConfig",
    "Tool",
    "ToolChoice",
    "ToolReferenceBlock",
    "ToolResultBlock",
    "ToolUseBlock",
]


class TextBlock(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Words."""

    text: str


class ImageSource(msgspec.Struct, frozen=True, kw_only=True):
    """A picture in the request, or its address."""

    type: Literal["base64", "url"]
    media_type: str = ""
    data: str = ""
    url: str = ""


class ImageBlock(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """A picture."""

    source: ImageSource


class TextSource(msgspec.Struct, frozen=True, kw_only=True, tag="text", tag_field="type"):
    """The words of a document; other kinds of source (PDF, file) are refused."""

    data: str


class DocumentBlock(msgspec.Struct, frozen=True, kw_only=True, tag="document"):
    """A document of plain text."""

    source: TextSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(msgspec.Struct, frozen=True, kw_only=True, tag="search_result"):
    """What a client's own search found."""

    source: str
    title: str
    content: list[TextBlock]


class ToolReferenceBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_reference"):
    """A deferred tool that a search found."""

    tool_name: str


class ThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="thinking"):
    """What the model thought; empty with a signature where the client asked not to see it."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, kw_only=True, tag="redacted_thinking"):
    """Thoughts that only another server can read."""


class ToolUseBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_use"):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]


ResultBlock: TypeAlias = TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock


class ToolResultBlock(msgspec.Struct, frozen=True, kw_only=True, tag="tool_result"):
    """What the client's tool answered."""

    tool_use_id: str
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None


Block: TypeAlias = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
)


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool of the client; one with a ``type`` other than ``custom`` is the API's own."""

    name: str = ""
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model may, must or must not call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model thinks, for how many tokens, and whether the client sees it."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: TokenCount | None = None
    display: str | None = None


class JSONFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The schema that the answer has to match."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How hard to try, and in what form to answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JSONFormat | None = None


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks."""

    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes the prompt: the body of ``/v1/messages/count_tokens``."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    metadata: Metadata | None = None
    adapter: str | None = None
    thread: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """The body of ``/v1/messages``."""

    max_tokens: TokenCount
    stream: bool | None = None
    stop_sequences: list[Annotated[str, msgspec.Meta(min_length=1)]] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)] | None = None
