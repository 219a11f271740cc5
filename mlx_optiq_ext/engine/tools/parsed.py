"""mlx-lm's tool parsers, called so that what they cannot read is an answer and no error.

Knows what they return, not what they read. The one place that calls them.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import msgspec

from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["Parsed", "Parser", "definitions", "parse", "parse_one"]

Parser: TypeAlias = Callable[[str, list[dict[str, Any]]], Any]
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    RecursionError,
    MemoryError,
)
"""What parsers raise when they meet text that is no call."""
_log = logging.getLogger(__name__)


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """One call."""

    name: str
    arguments: dict[str, Any]


def definitions(tools: Iterable[ToolSpec]) -> list[dict[str, Any]]:
    """Tools in the form that templates and parsers take."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": {"type": "object", "properties": {}, **tool.parameters},
            },
        }
        for tool in tools
    ]


def parse(parser: Parser, text: str, tools: list[dict[str, Any]]) -> list[Parsed]:
    """The calls in a text; none where the parser cannot read it."""
    try:
        found = parser(text, tools)
    except _UNREADABLE as error:
        _log.debug("no call in %r: %s", text, error)
        return []
    calls = found if isinstance(found, list) else [found]
    if not all(_is_call(call) for call in calls):
        return []
    return [Parsed(name=call["name"].strip(), arguments=call["arguments"]) for call in calls]


def parse_one(parser: Parser, text: str, tools: list[dict[str, Any]]) -> Parsed | None:
    """The only call in a text; None where there are none or more."""
    calls = parse(parser, text, tools)
    return calls[0] if len(calls) == 1 else None


def _is_call(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("name"), str)
        and isinstance(found.get("arguments"), dict)
    )
