"""A conversation as plain values: turns, how they were asked for, what they cost.

Knows no file, no server and no widget. Stored by ``store``, sent by ``wire``, grown by ``turn``, drawn by the
screen.
"""

from typing import Literal, TypeAlias

import msgspec

from mlx_optiq_tui.chat.plain import plain

__all__ = [
    "EFFORTS",
    "AnswerStats",
    "AssistantMessage",
    "ChatMessage",
    "ChatSettings",
    "Conversation",
    "Draft",
    "Effort",
    "StoredImage",
    "ToolMessage",
    "ToolUse",
    "UserMessage",
    "as_markdown",
    "named",
    "title_of",
]

Effort: TypeAlias = Literal["", "none", "minimal", "low", "medium", "high", "xhigh"]
EFFORTS: tuple[Effort, ...] = ("", "none", "minimal", "low", "medium", "high", "xhigh")

_TITLE_CHARACTERS = 60


class ChatSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an answer is asked for; what is not set is left to the server."""

    model: str = ""
    adapter: str = ""
    """Empty: the server's default; ``base``: the model without any."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    effort: Effort = ""
    """How long to think."""
    system: str = ""
    tools: tuple[str, ...] = ()
    """Names of the tools that are offered."""


class StoredImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A picture beside the conversation."""

    file: str
    """Name in the conversation's folder of pictures."""
    media_type: str
    label: str = ""
    """Where it came from, for people."""


class ToolUse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that the model asks for."""

    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class Draft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is written and not sent."""

    format_version: int = 1
    text: str = ""
    images: tuple[StoredImage, ...] = ()
    is_editing: bool = False
    """It will take the place of the last question."""


class AnswerStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an answer cost, as seen from here; token counts are the server's."""

    first_token_s: float | None = None
    tokens_per_s: float | None = None
    """After the first token."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


class UserMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="user"):
    """What was typed."""

    text: str
    images: tuple[StoredImage, ...] = ()


class AssistantMessage(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="assistant"
):
    """What the model said."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolUse, ...] = ()
    end: str = ""
    """``stop``, ``length``, ``tool_calls``, or ``stopped`` by the user; empty where it broke off."""
    settings: ChatSettings = ChatSettings()
    stats: AnswerStats = AnswerStats()


class ToolMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="tool"):
    """What became of a call."""

    call_id: str
    name: str
    text: str
    outcome: Literal["ran", "refused", "failed"]


ChatMessage: TypeAlias = UserMessage | AssistantMessage | ToolMessage


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    format_version: int = 1
    id: str
    title: str = ""
    """Empty: named after its first words."""
    created: float
    """Seconds since 1970."""
    changed: float
    settings: ChatSettings = ChatSettings()
    """Of the next answer."""
    messages: tuple[ChatMessage, ...] = ()
    others: tuple[tuple[ChatMessage, ...], ...] = ()
    """The messages as they were each time before the last question was asked again or edited."""

    @property
    def name(self) -> str:
        """Its title, or the beginning of what was asked first."""
        return self.title or title_of(self.messages)

    def with_messages(self, *messages: ChatMessage) -> "Conversation":
        """With these at its end."""
        return msgspec.structs.replace(self, messages=(*self.messages, *messages))

    def asking_instead(self, question: UserMessage) -> "Conversation":
        """With another question in place of the last one; what was answered to that is kept as another."""
        before, asked = self.before_last_question()
        was_answered = asked is not None and self.messages[-1] != asked
        others = (*self.others, self.messages) if was_answered else self.others
        return msgspec.structs.replace(before, messages=(*before.messages, question), others=others)

    def other_answer(self) -> "Conversation":
        """With the oldest of the others, this one being the newest of them; all come round."""
        if not self.others:
            return self
        oldest, *rest = self.others
        return msgspec.structs.replace(self, messages=oldest, others=(*rest, self.messages))

    def before_last_question(self) -> "tuple[Conversation, UserMessage | None]":
        """Everything before the last thing that was typed, and that."""
        for index in reversed(range(len(self.messages))):
            message = self.messages[index]
            if isinstance(message, UserMessage):
                return msgspec.structs.replace(self, messages=self.messages[:index]), message
        return self, None


def title_of(messages: tuple[ChatMessage, ...]) -> str:
    """The beginning of what was asked first, on one line."""
    asked = next((message.text for message in messages if isinstance(message, UserMessage)), "")
    words = " ".join(asked.split())
    if len(words) > _TITLE_CHARACTERS:
        words = words[: _TITLE_CHARACTERS - 1].rstrip() + "…"
    return words or "New conversation"


def as_markdown(conversation: Conversation, images: str = "images") -> str:
    """The conversation for other programs.

    Args:
        conversation: What to write.
        images: Where its pictures are, relative to the Markdown file.
    """
    parts = [f"# {' '.join(conversation.name.split())}"]
    if conversation.settings.system:
        parts.append("## System\n\n" + conversation.settings.system)
    parts += [_message_markdown(message, images) for message in conversation.messages]
    return plain("\n\n".join(parts)) + "\n"


def _label(image: StoredImage) -> str:
    """Words that cannot end the Markdown they stand in."""
    return (image.label or image.file).translate({ord(sign): " " for sign in "[]()\n"})


def _message_markdown(message: ChatMessage, images: str) -> str:
    if isinstance(message, UserMessage):
        shown = [f"![{_label(image)}]({images}/{image.file})" for image in message.images]
        return "\n\n".join(["## You", *shown, message.text])
    if isinstance(message, ToolMessage):
        return f"### Tool {message.name}: {message.outcome}\n\n{_fenced(message.text)}"
    parts = ["## " + " · ".join(["Model", *filter(None, [named(message.settings)])])]
    if message.reasoning:
        parts.append("\n".join(f"> {line}".rstrip() for line in message.reasoning.strip().splitlines()))
    if message.text:
        parts.append(message.text)
    parts += [f"### Call {call.name}\n\n{_fenced(call.arguments, 'json')}" for call in message.tool_calls]
    return "\n\n".join(parts)


def named(settings: ChatSettings) -> str:
    """Model and adapter in one word, ``model@name``; empty where both are the server's choice."""
    return settings.model + (f"@{settings.adapter}" if settings.adapter else "")


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
