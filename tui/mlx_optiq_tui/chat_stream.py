"""What a server streams, read: server-sent events, and the pieces of a chat answer.

Knows the wire and no connection. Used by ``client``; the chat screen draws the pieces.

Source: WHATWG HTML, "Server-sent events"; OpenAI API reference, "Chat completions: streaming".
"""

import codecs
from collections.abc import AsyncIterator

import msgspec

from mlx_optiq_ext.errors import EngineError, RequestError

__all__ = [
    "ChatDelta",
    "ChatUsage",
    "ServerEvent",
    "ToolCallPart",
    "chat_deltas",
    "server_events",
    "text_lines",
]

_DONE = "[DONE]"


class ServerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One server-sent event."""

    name: str = "message"
    data: str


class ToolCallPart(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a tool call: id and name come first, then the arguments in pieces."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ChatUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one chunk of an answer adds."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    finish_reason: str | None = None
    """``stop``, ``length`` or ``tool_calls``, in the last piece."""
    usage: ChatUsage | None = None
    """After the last piece."""


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, frozen=True):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[_Call, ...] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details = _Details()
    completion_tokens_details: _Details = _Details()


class _Error(msgspec.Struct, frozen=True):
    message: str = "the server gave no reason"


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


async def text_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of a stream: ended by LF or CR LF, by nothing else that Unicode calls a line's end."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    async for chunk in chunks:
        *lines, held = (held + decoder.decode(chunk)).split("\n")
        for line in lines:
            yield line.removesuffix("\r")
    if held:
        yield held


async def server_events(lines: AsyncIterator[str]) -> AsyncIterator[ServerEvent]:
    """The events in a stream's lines; comments are left out."""
    name, data = "message", list[str]()
    async for line in lines:
        if not line:
            if data:
                yield ServerEvent(name=name, data="\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)


async def chat_deltas(events: AsyncIterator[ServerEvent]) -> AsyncIterator[ChatDelta]:
    """The pieces of one answer.

    Raises:
        RequestError: The server tells an error in the stream.
        EngineError: The stream ends before the answer does, or holds something else.
    """
    decoder = msgspec.json.Decoder(_Chunk)
    async for event in events:
        if event.data == _DONE:
            return
        try:
            chunk = decoder.decode(event.data)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise EngineError(f"the server streams what is no chat answer ({error})") from error
        if chunk.error is not None:
            raise RequestError(chunk.error.message)
        for choice in chunk.choices[:1]:
            yield _delta(choice)
        if chunk.usage is not None:
            yield ChatDelta(usage=_usage(chunk.usage))
    raise EngineError("the answer broke off: the server closed the stream")


def _delta(choice: _Choice) -> ChatDelta:
    delta = choice.delta
    return ChatDelta(
        text=delta.content or "",
        reasoning=delta.reasoning_content or "",
        tool_calls=tuple(
            ToolCallPart(
                index=call.index,
                id=call.id or "",
                name=call.function.name or "",
                arguments=call.function.arguments or "",
            )
            for call in delta.tool_calls or ()
        ),
        finish_reason=choice.finish_reason,
    )


def _usage(usage: _Usage) -> ChatUsage:
    return ChatUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        reasoning_tokens=usage.completion_tokens_details.reasoning_tokens,
    )
