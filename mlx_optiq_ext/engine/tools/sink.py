"""Tool calls on their way to the client: begun, grown and ended, never contradicting what was said.

Knows nothing of how models write calls; the readers call it.
"""

import secrets
import string
from collections.abc import Iterable

from mlx_optiq_ext.engine.tools.lenient_json import LenientJson
from mlx_optiq_ext.types.chat import ToolSpec
from mlx_optiq_ext.types.events import Event, ToolCallDelta, ToolCallEnd, ToolCallStart

__all__ = ["CallSink"]

_ALPHABET = string.ascii_letters + string.digits


class CallSink:
    """Collects the events of all calls of one answer.

    Args:
        tools: What may be called.
    """

    def __init__(self, tools: Iterable[ToolSpec]) -> None:
        self.num_calls = 0
        self._tools = {tool.name: tool for tool in tools}
        self._folded: dict[str, list[str]] = {}
        for name in self._tools:
            self._folded.setdefault(name.casefold(), []).append(name)
        self._events: list[Event] = []
        self._open: ToolCallStart | None = None
        self._sent: list[str] = []
        self._unsent: list[str] = []

    @property
    def is_open(self) -> bool:
        """Whether a call has begun and not ended."""
        return self._open is not None

    def tool(self, name: str) -> ToolSpec | None:
        """The tool that is meant: of this name, or the only one that differs in case alone."""
        alike = self._folded.get(name.casefold(), [])
        return self._tools.get(name) or (self._tools[alike[0]] if len(alike) == 1 else None)

    def take(self) -> list[Event]:
        """Events since the last call."""
        self._flush()
        events, self._events = self._events, []
        return events

    def start(self, name: str) -> None:
        """A call begins."""
        assert self._open is None
        tool = self.tool(name)
        identifier = "call" + "".join(secrets.choice(_ALPHABET) for _ in range(24))
        self._open = ToolCallStart(
            index=self.num_calls, id=identifier, name=tool.name if tool is not None else name
        )
        self.num_calls += 1
        self._events.append(self._open)

    def add(self, piece: str) -> None:
        """More of the arguments' JSON."""
        if piece:
            self._unsent.append(piece)

    def grow(self, arguments: str) -> bool:
        """The arguments' JSON begins with this; whether that goes on from what was told."""
        told = self._told()
        if arguments.startswith(told):
            self.add(arguments[len(told) :])
            return True
        return False

    def end(self, arguments: str | None = None) -> None:
        """The call is complete.

        Args:
            arguments: All of its JSON; None, or one that contradicts what was told: what was told is closed.
        """
        assert self._open is not None
        if arguments is None or not self.grow(arguments):
            self.add(_closing(self._told()))
        self._flush()
        start, self._open = self._open, None
        self._events.append(
            ToolCallEnd(index=start.index, id=start.id, name=start.name, arguments="".join(self._sent))
        )
        self._sent = []

    def cut(self) -> None:
        """The answer was cut in the middle of a call: what was told of it stays as it is, without an end."""
        self._flush()
        self._open, self._sent = None, []

    def _told(self) -> str:
        self._sent = ["".join(self._sent)]
        return self._sent[0] + "".join(self._unsent)

    def _flush(self) -> None:
        piece = "".join(self._unsent)
        self._unsent = []
        if piece and self._open is not None:
            self._sent.append(piece)
            self._events.append(ToolCallDelta(index=self._open.index, arguments=piece))


def _closing(told: str) -> str:
    """What makes one JSON object of its beginning."""
    if not told:
        return "{}"
    reader = LenientJson()
    reader.feed(told)
    reader.close()
    whole = reader.take()
    assert whole.startswith(told)
    return whole[len(told) :]
