"""The conversation of ``/v1/messages`` in our own types, with a head that stays the same from turn to turn.

Clients vary what does not matter: a line for billing that differs in every conversation, a string in place of
a list of one block, marks for caching. All of that is evened out here; where system messages go is the
engine's business. Called by ``to_generation``; knows no template and no token.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.anthropic import schema
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.turns import Turns
from mlx_optiq_ext.serve.unseen import reveal
from mlx_optiq_ext.types.chat import (
    Image,
    Message,
    Part,
    Reasoning,
    Text,
    ToolCall,
    ToolResult,
    ToolSpec,
)

__all__ = ["to_messages"]

BILLING = "x-anthropic-billing-header:"

_Content: TypeAlias = str | Sequence[schema.Block]


def to_messages(
    request: schema.CountTokensRequest, tools: Sequence[ToolSpec], images: ImageReader
) -> tuple[Message, ...]:
    """Translate the system prompt and every turn.

    Consecutive turns of one role are one.

    Args:
        request: As decoded.
        tools: Those of the request, for the references to them in tool results.
        images: Which pictures are taken; one by URL is fetched here.
    Raises:
        RequestError: A block is in a turn that cannot hold it, or names what is not there.
    """
    if not request.messages:
        raise RequestError("messages is empty; at least one user turn is needed", param="messages")
    reader, turns = _Reader(tools, images), Turns()
    for text in _system_texts(request.system):
        turns.add("system", text)
    for index, message in enumerate(request.messages):
        for part in reader.parts(message, f"messages[{index}].content"):
            turns.add(message.role, part)
    return turns.messages()


def _system_texts(system: str | Sequence[schema.TextBlock] | None) -> list[Text]:
    texts = [system] if isinstance(system, str) else [block.text for block in system or ()]
    return [Text(text=text) for text in map(_without_billing, texts) if text]


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(BILLING) else text


class _Reader:
    """Translates blocks."""

    def __init__(self, tools: Sequence[ToolSpec], images: ImageReader) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._images = images

    def texts(self, content: _Content, path: str) -> list[Text]:
        """Translate content that may hold words only."""
        if isinstance(content, str):
            return [Text(text=content)] if content else []
        for index, block in enumerate(content):
            if not isinstance(block, schema.TextBlock):
                raise _misplaced(block, "system", f"{path}[{index}]")
        return [
            Text(text=block.text) for block in content if isinstance(block, schema.TextBlock) and block.text
        ]

    def parts(self, message: schema.Message, path: str) -> Sequence[Part]:
        """Translate one turn."""
        if message.role == "system" or isinstance(message.content, str):
            return self.texts(message.content, path)
        translate = self._said if message.role == "user" else self._generated
        parts = [translate(block, f"{path}[{index}]") for index, block in enumerate(message.content)]
        return [part for part in parts if part is not None]

    def _said(self, block: schema.Block, path: str) -> Part | None:
        match block:
            case schema.ToolResultBlock():
                return ToolResult(
                    id=block.tool_use_id,
                    parts=self._result(block.content, f"{path}.content"),
                    is_error=bool(block.is_error),
                )
            case schema.ThinkingBlock() | schema.RedactedThinkingBlock() | schema.ToolUseBlock():
                raise _misplaced(block, "user", path)
            case _:
                return self._shown(block, path)

    def _generated(self, block: schema.Block, path: str) -> Part | None:
        match block:
            case schema.TextBlock(text=text):
                return Text(text=text) if text else None
            case schema.ThinkingBlock(thinking=thinking, signature=signature):
                text = thinking or reveal(signature)
                return Reasoning(text=text, signature=signature) if text else None
            case schema.RedactedThinkingBlock():
                return None
            case schema.ToolUseBlock(id=call_id, name=name, input=arguments):
                return ToolCall(id=call_id, name=name, arguments=arguments)
            case _:
                raise _misplaced(block, "assistant", path)

    def _result(
        self, content: str | Sequence[schema.ResultBlock] | None, path: str
    ) -> tuple[Text | Image, ...]:
        if isinstance(content, str):
            return (Text(text=content),)
        parts = [
            Text(text=self._definition(block.tool_name, f"{path}[{index}].tool_name"))
            if isinstance(block, schema.ToolReferenceBlock)
            else self._shown(block, f"{path}[{index}]")
            for index, block in enumerate(content or ())
        ]
        return tuple(part for part in parts if part is not None)

    def _definition(self, name: str, path: str) -> str:
        tool = self._tools.get(name)
        if tool is None:
            raise RequestError(f"tool reference {name!r} is not among the tools of the request", param=path)
        function = {"name": name, "description": tool.description, "parameters": tool.parameters}
        return msgspec.json.encode({"type": "function", "function": function}).decode()

    def _shown(self, block: schema.Block | schema.ResultBlock, path: str) -> Text | Image | None:
        match block:
            case schema.TextBlock(text=text):
                return Text(text=text) if text else None
            case schema.ImageBlock(source=source):
                if source.type == "url":
                    return self._images.from_url(source.url, param=f"{path}.source.url")
                return self._images.from_base64(source.data, source.media_type, param=f"{path}.source.data")
            case schema.DocumentBlock():
                return Text(text="\n".join(filter(None, (block.title, block.context, block.source.data))))
            case schema.SearchResultBlock():
                found = (text.text for text in block.content)
                return Text(text="\n".join((block.title, block.source, *found)))
            case _:
                raise _misplaced(block, "shown", path)


def _misplaced(block: schema.Block | schema.ResultBlock, role: str, path: str) -> RequestError:
    kind = type(block).__struct_config__.tag
    article = "an" if role == "assistant" else "a"
    return RequestError(f"{article} {role} turn cannot hold a block of type {kind!r}", param=path)
