"""What a client asks for, whatever API it speaks: the one form that every dialect translates to.

Plain values; made by ``serve``, read by ``engine``. Nothing here knows a protocol, a template or a token.
"""

from typing import Any, Literal, TypeAlias

import msgspec

__all__ = [
    "Constraint",
    "Generation",
    "Image",
    "Message",
    "Part",
    "Reasoning",
    "ReasoningOptions",
    "Role",
    "Sampling",
    "Text",
    "ToolCall",
    "ToolChoice",
    "ToolResult",
    "ToolSpec",
]

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


class Text(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """Words."""

    text: str


class Image(msgspec.Struct, frozen=True, kw_only=True, tag="image"):
    """A picture, as it was sent; not decoded."""

    data: bytes
    media_type: str
    param: str = ""
    """Path of the field in the client's request, for errors."""


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, tag="reasoning"):
    """What the model thought in an earlier turn, as the client sent it back."""

    text: str
    signature: str = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, tag="tool_call"):
    """A call that the model made in an earlier turn."""

    id: str
    name: str
    arguments: dict[str, Any]


class ToolResult(msgspec.Struct, frozen=True, kw_only=True, tag="tool_result"):
    """What a tool answered."""

    id: str
    parts: "tuple[Text | Image, ...]"
    is_error: bool = False
    name: str = ""
    """Name of the tool, where the dialect says it or an earlier call has the same id."""


Part: TypeAlias = Text | Image | Reasoning | ToolCall | ToolResult


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. A ``tool`` message holds tool results only; only ``assistant`` ones reason and call."""

    role: Role
    parts: tuple[Part, ...]


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    """As the model sees it: a tool of a namespace is ``namespace.name``."""
    description: str = ""
    parameters: dict[str, Any] = {}
    """JSON schema of the arguments, an object."""
    deferred: bool = False
    """May be called, and is left out of the prompt so that a tool found later does not change its head."""


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model may, must or must not call."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    """The tool of ``named``."""
    parallel: bool = True
    """More than one call in a turn."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is drawn; None: the server's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated so far."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the token was generated."""
    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies negative ones, of tokens in prompt and answer."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    """How many most likely tokens to report beside the drawn one; None: no log-probabilities at all."""


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the visible answer must look like."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    value: dict[str, Any] | str | bool = ""
    """The schema, the pattern, or the grammar; nothing for ``json_object``."""
    param: str = "response_format"
    """Path of the field in the client's request, for errors."""


class ReasoningOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Whether and how long to think before the answer."""

    enabled: bool | None = None
    """None: as the model's template does by itself."""
    effort: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None
    budget: int | None = None
    """Tokens after which thinking is closed; None: as the effort says, else unlimited."""


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One request: a conversation or a plain prompt, and how to go on from it."""

    model: str = ""
    """As the client named it; aliases are resolved by the engine."""
    adapter: str | None = None
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    """Text or token ids to continue as they are; then there are no messages and no template."""
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    constraint: Constraint | None = None
    reasoning: ReasoningOptions = ReasoningOptions()
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    """Clamped to the context that is left; None: all of it."""
    session: str = ""
    """Requests of one session take turns with other sessions."""
