"""Refuse what cannot fit before any of it is tokenized: megabytes of text take seconds, and all others wait.

Knows characters only. Called on the prompt thread.
"""

from typing import Any

import msgspec

from mlx_optiq_ext.errors import PromptTooLong
from mlx_optiq_ext.types.chat import Generation, Image, Reasoning, Text, ToolCall, ToolResult

__all__ = ["longest_token", "require_tokenizable"]

_ROOM = 2
"""Contexts' worth of text that are tokenized all the same: normalizing may shorten a text."""


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token of a vocabulary."""
    return max((len(text) for text in tokenizer.get_vocab()), default=1)


def require_tokenizable(request: Generation, context: int, longest: int) -> None:
    """Refuse a request whose text has more tokens than the context even if all of them were the longest one.

    Args:
        longest: From :func:`longest_token`.
    Raises:
        PromptTooLong: It has; the number is a lower bound.
    """
    least = _characters(request) // longest
    if least > _ROOM * context:
        raise PromptTooLong(least, context, is_least=True)


def _characters(request: Generation) -> int:
    if request.prompt is not None:
        return len(request.prompt) if isinstance(request.prompt, str) else 0
    shown = [tool for tool in request.tools if not tool.deferred]
    tools = sum(len(tool.description) + _document(tool.parameters) for tool in shown)
    return tools + sum(_part(part) for message in request.messages for part in message.parts)


def _part(part: Text | Image | Reasoning | ToolCall | ToolResult) -> int:
    match part:
        case Text() | Reasoning():
            return len(part.text)
        case ToolCall():
            return _document(part.arguments)
        case ToolResult():
            return sum(_part(inner) for inner in part.parts)
    return 0


def _document(value: object) -> int:
    """Characters of JSON, at least: four bytes are one."""
    return len(msgspec.json.encode(value)) // 4
