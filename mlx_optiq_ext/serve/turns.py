"""Parts of a conversation gathered into messages, as dialects hand them over one by one.

Knows our own types only. Used by the dialects whose conversations are lists of blocks or items.
"""

from typing import Any

import msgspec

from mlx_optiq_ext.types.chat import Message, Part, Role, ToolCall, ToolResult

__all__ = ["Turns", "parse_arguments"]

UNREADABLE = "_raw"


class Turns:
    """Consecutive parts of one role are one message; results learn their tool's name from the call before."""

    def __init__(self) -> None:
        self._turns: list[tuple[Role, list[Part]]] = []
        self._called: dict[str, str] = {}

    def add(self, role: Role, part: Part) -> None:
        """Append a part; a tool's result is a ``tool`` message, whoever hands it over."""
        if isinstance(part, ToolCall):
            self._called[part.id] = part.name
        elif isinstance(part, ToolResult):
            role = "tool"
            part = msgspec.structs.replace(part, name=part.name or self._called.get(part.id, ""))
        if not self._turns or self._turns[-1][0] != role:
            self._turns.append((role, []))
        self._turns[-1][1].append(part)

    def messages(self) -> tuple[Message, ...]:
        """All of them, in order."""
        return tuple(Message(role=role, parts=tuple(parts)) for role, parts in self._turns)


def parse_arguments(text: str) -> dict[str, Any]:
    """Decode the arguments of an earlier call.

    Returns:
        The object; where ``text`` is none, the text itself under ``_raw``, so that nothing is lost and the
        prompt stays the same from turn to turn.
    """
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {UNREADABLE: text}
