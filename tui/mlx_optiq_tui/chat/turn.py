"""One turn: the model's answers and the tools between them, until it has answered.

Knows neither files nor widgets: it is given a conversation that ends with a question, tells what happens, and
holds what has been said so far, also of an answer that was stopped. Driven by the chat screen.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from mlx_optiq_tui.chat.conversation import (
    AnswerStats,
    AssistantMessage,
    ChatSettings,
    Conversation,
    ToolMessage,
    ToolUse,
)
from mlx_optiq_tui.chat.tools import TOOLS, ToolBox
from mlx_optiq_tui.chat.wire import ReadImage, request_body
from mlx_optiq_tui.chat_stream import ChatDelta, ChatUsage

__all__ = [
    "MAX_CALLS",
    "MAX_ROUNDS",
    "Answering",
    "Consent",
    "Decision",
    "News",
    "Streams",
    "Turn",
    "settled",
]

MAX_ROUNDS = 8
"""Answers that call tools; the next one has to do without."""
MAX_CALLS = 16
"""Calls of one answer that are done."""
_REFUSED = "The user refused this call. Go on without it, or ask what they would rather have."

Decision: TypeAlias = Literal["once", "conversation", "refuse"]
Consent: TypeAlias = Callable[[ToolUse], Awaitable[Decision]]
News: TypeAlias = ChatDelta | AssistantMessage | ToolMessage


class Streams(Protocol):
    """What streams answers: the server's client."""

    def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[ChatDelta, None]:
        """Stream one."""
        ...


class Answering:
    """An answer as it grows.

    Args:
        settings: How it was asked for.
        clock: Seconds that only grow.
    """

    def __init__(self, settings: ChatSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._begun = clock()
        self._first: float | None = None
        self._last = self._begun
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolUse] = {}
        self._usage: ChatUsage | None = None
        self._end = ""

    def add(self, delta: ChatDelta) -> None:
        """Take a piece."""
        self._usage = delta.usage or self._usage
        self._end = delta.finish_reason or self._end
        if not (delta.text or delta.reasoning or delta.tool_calls):
            return
        self._last = self._clock()
        self._first = self._last if self._first is None else self._first
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        for part in delta.tool_calls:
            known = self._calls.get(part.index, ToolUse(id="", name="", arguments=""))
            self._calls[part.index] = ToolUse(
                id=known.id or part.id,
                name=known.name or part.name,
                arguments=known.arguments + part.arguments,
            )

    def message(self, end: str = "") -> AssistantMessage:
        """What has come so far; a call that is not complete is left out where the answer was cut."""
        return AssistantMessage(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tool_calls=tuple(self._calls.values()) if not end else (),
            end=end or self._end,
            settings=self._settings,
            stats=self._stats(),
        )

    def _stats(self) -> AnswerStats:
        usage, first = self._usage, self._first
        rate = None
        if usage is not None and first is not None and self._last > first and usage.completion_tokens > 1:
            rate = (usage.completion_tokens - 1) / (self._last - first)
        return AnswerStats(
            first_token_s=None if first is None else first - self._begun,
            tokens_per_s=rate,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=usage.cached_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )


class Turn:
    """Answer the question at a conversation's end.

    Args:
        streams: Asked for answers.
        conversation: Ends with the question.
        tools: Runs what is allowed.
        consent: Asks the person; not asked again for what is in ``allowed``.
        read_image: Gives a picture's bytes.
    """

    def __init__(
        self,
        streams: Streams,
        conversation: Conversation,
        tools: ToolBox,
        consent: Consent,
        read_image: ReadImage,
    ) -> None:
        self.conversation = conversation
        self.answering: Answering | None = None
        self.allowed: set[str] = set()
        """Tools that were allowed for the whole conversation."""
        self._streams, self._tools, self._consent, self._read_image = streams, tools, consent, read_image

    async def run(self) -> AsyncGenerator[News, None]:
        """Go on until the model has answered; each piece, each whole answer, each tool's result.

        Raises:
            OptiqError: What the client raises.
        """
        settings = self.conversation.settings
        tools = [TOOLS[name].definition for name in settings.tools]
        for number in range(MAX_ROUNDS + 1):
            self.answering = Answering(settings)
            body = request_body(self.conversation, self._read_image, tools, may_call=number < MAX_ROUNDS)
            async with contextlib.aclosing(self._streams.chat(body)) as deltas:
                async for delta in deltas:
                    self.answering.add(delta)
                    yield delta
            message = self.answering.message()
            self._keep(message)
            self.answering = None
            yield message
            for order, call in enumerate(message.tool_calls):
                told = await self._use(call, too_many=order >= MAX_CALLS or number == MAX_ROUNDS)
                self._keep(told)
                yield told
            if not message.tool_calls:
                return

    def cut(self, *, broke_off: bool = False) -> bool:
        """Keep what had been said when the answer was stopped or broke off; calls get an answer each.

        Args:
            broke_off: Nobody stopped it.
        Returns:
            Whether there was anything to cut.
        """
        was_answering, before = self.answering is not None, self.conversation
        self.conversation = settled(before)
        if self.answering is not None:
            message = self.answering.message("stopped")
            if message.text or message.reasoning:
                self._keep(msgspec.structs.replace(message, end="") if broke_off else message)
            self.answering = None
        return was_answering or self.conversation is not before

    async def _use(self, call: ToolUse, *, too_many: bool) -> ToolMessage:
        if too_many:
            text = (
                f"error: not done; {MAX_CALLS} calls in an answer and {MAX_ROUNDS} such answers are the limit"
            )
            return ToolMessage(call_id=call.id, name=call.name, text=text, outcome="failed")
        if call.name not in self.conversation.settings.tools:
            text = f"error: there is no tool {call.name!r}"
            return ToolMessage(call_id=call.id, name=call.name, text=text, outcome="failed")
        if call.name not in self.allowed:
            decision = await self._consent(call)
            if decision == "refuse":
                return ToolMessage(call_id=call.id, name=call.name, text=_REFUSED, outcome="refused")
            if decision == "conversation":
                self.allowed.add(call.name)
        return await self._tools.run(call)

    def _keep(self, message: AssistantMessage | ToolMessage) -> None:
        self.conversation = self.conversation.with_messages(message)


def settled(conversation: Conversation) -> Conversation:
    """With an answer to each call of the last answer that has none; itself where all have one."""
    for call in _unanswered(conversation):
        text = "The user stopped before this call was done."
        told = ToolMessage(call_id=call.id, name=call.name, text=text, outcome="refused")
        conversation = conversation.with_messages(told)
    return conversation


def _unanswered(conversation: Conversation) -> list[ToolUse]:
    """Calls of the last answer that have no result."""
    answered = set()
    for message in reversed(conversation.messages):
        if isinstance(message, AssistantMessage):
            return [call for call in message.tool_calls if call.id not in answered]
        if isinstance(message, ToolMessage):
            answered.add(message.call_id)
    return []
