"""A conversation as the server is asked to go on with it.

Source: OpenAI API reference, "Create chat completion"; ``adapter`` and ``reasoning_content`` as
docs/serving.md tells them.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any

from mlx_optiq_tui.chat.conversation import (
    AssistantMessage,
    ChatMessage,
    Conversation,
    StoredImage,
    ToolMessage,
    UserMessage,
)

__all__ = ["ReadImage", "request_body"]

ReadImage = Callable[[StoredImage], bytes]


def request_body(
    conversation: Conversation,
    read_image: ReadImage,
    tools: Sequence[dict[str, Any]] = (),
    *,
    may_call: bool = True,
) -> dict[str, Any]:
    """The body of ``/v1/chat/completions``, without what streaming needs.

    Args:
        conversation: Ends with what is to be answered.
        read_image: Gives a picture's bytes.
        tools: Definitions of what is offered.
        may_call: False lets the model see tools and call none.
    """
    settings = conversation.settings
    messages: list[dict[str, Any]] = []
    if settings.system:
        messages.append({"role": "system", "content": settings.system})
    messages += [_message(message, read_image) for message in conversation.messages]
    asked = {
        "model": settings.model or None,
        "adapter": settings.adapter or None,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "reasoning_effort": settings.effort or None,
        "tools": list(tools) or None,
        "tool_choice": "none" if tools and not may_call else None,
        # Requests of one conversation take turns with others', and find their prefix again.
        "prompt_cache_key": conversation.id,
    }
    return {"messages": messages, **{name: value for name, value in asked.items() if value is not None}}


def _message(message: ChatMessage, read_image: ReadImage) -> dict[str, Any]:
    if isinstance(message, UserMessage):
        return {"role": "user", "content": _user_content(message, read_image)}
    if isinstance(message, ToolMessage):
        return {"role": "tool", "tool_call_id": message.call_id, "content": message.text}
    return _assistant(message)


def _user_content(message: UserMessage, read_image: ReadImage) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    parts: list[dict[str, Any]] = []
    for image in message.images:
        data = base64.b64encode(read_image(image)).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:{image.media_type};base64,{data}"}})
    return [*parts, {"type": "text", "text": message.text}]


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": "assistant", "content": message.text}
    if message.reasoning:
        sent["reasoning_content"] = message.reasoning
    if message.tool_calls:
        sent["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return sent
