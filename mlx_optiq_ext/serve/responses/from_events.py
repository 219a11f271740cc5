"""From the events of a job to a response of the OpenAI dialect: as a stream, or whole.

One state machine grows the items of the answer; the stream sends what it tells, the whole response is what it
holds at the end. Called by the routes through ``serve.sse``.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mlx_optiq_ext.serve.responses.document import usage_of
from mlx_optiq_ext.serve.responses.errors import failure
from mlx_optiq_ext.serve.responses.output import (
    CallItem,
    CustomCallItem,
    MessageItem,
    OutputItem,
    RawReasoningItem,
    SummaryItem,
)
from mlx_optiq_ext.serve.responses.tools import ToolTable
from mlx_optiq_ext.serve.sse import sse_event
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)

__all__ = ["Drafting", "ResponseStream"]

HEARTBEATS_PER_LINE = 3
"""A heartbeat repeats the whole response, so that only each third one is sent."""


class Drafting(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream needs to know beside the events."""

    document: dict[str, Any]
    """The response as it begins."""
    table: ToolTable = ToolTable()
    summarize: bool = False
    """Show thoughts as a summary."""
    seal: bool = False
    """Give thoughts back as encrypted content too."""
    keep: Callable[[dict[str, Any]], None] | None = None
    """Gets the response when it has ended."""


class ResponseStream:
    """Writes a response as server-sent events and keeps it."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self.response = dict(drafting.document)
        self._number = 0
        self._open: OutputItem | None = None
        self._output: list[dict[str, Any]] = []
        self._heartbeats = 0

    def first(self, accepted: Accepted) -> bytes:
        """Render ``response.created`` and ``response.in_progress``."""
        self.response["model"] = accepted.model
        return self._envelope("created") + self._envelope("in_progress")

    def heartbeat(self) -> bytes:
        """Repeat ``response.in_progress``, every few seconds."""
        self._heartbeats += 1
        return b"" if self._heartbeats % HEARTBEATS_PER_LINE else self._envelope("in_progress")

    def feed(self, event: Event, choice: int = 0) -> bytes:  # noqa: ARG002 - there is one answer, number 0
        """Render what an event adds."""
        match event:
            case TextDelta() if event.text:
                return self._text(event)
            case ReasoningDelta(text=text) if text:
                return self._thought(text)
            case ToolCallStart():
                origin = self._drafting.table.origin(event.name)
                return self._begin((CustomCallItem if origin.custom else CallItem)(event, origin))
            case ToolCallDelta(arguments=arguments) if arguments:
                return self._add(arguments)
            case ToolCallEnd():
                return self._end()
            case Finished():
                return self._finish(event)
            case _:
                return b""

    def failed(self, failed: Failed) -> bytes:
        """Render ``response.failed``, which ends the stream."""
        self.response |= {"status": "failed", "error": failure(failed)}
        self.response["output"] = self._output
        return self._envelope("failed")

    def _text(self, delta: TextDelta) -> bytes:
        chunk = b"" if isinstance(self._open, MessageItem) else self._begin(MessageItem())
        return chunk + self._add(delta.text, delta.logprobs)

    def _thought(self, text: str) -> bytes:
        kind = SummaryItem if self._drafting.summarize else RawReasoningItem
        chunk = b"" if isinstance(self._open, kind) else self._begin(kind(sealed=self._drafting.seal))
        return chunk + self._add(text)

    def _add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> bytes:
        assert self._open is not None
        return self._lines(self._open.add(text, logprobs))

    def _begin(self, item: OutputItem) -> bytes:
        chunk = self._end()
        self._open = item
        added = {"type": "response.output_item.added", "output_index": len(self._output), "item": item.item}
        return chunk + self._line(added) + self._lines(item.begin())

    def _end(self, status: str = "completed") -> bytes:
        """End the open item and keep it; of a call that was cut nothing is told to be done but the item."""
        if self._open is None:
            return b""
        ends, item = self._open.end(), self._open.item
        is_cut = status != "completed" and isinstance(self._open, CallItem | CustomCallItem)
        chunk = b"" if is_cut else self._lines(ends)
        self._open = None
        item["status"] = status
        done = {"type": "response.output_item.done", "output_index": len(self._output), "item": item}
        self._output.append(item)
        return chunk + self._line(done)

    def _finish(self, finished: Finished) -> bytes:
        whole = finished.reason not in ("length", "cancelled")
        chunk = self._end("completed" if whole else "incomplete")
        self.response |= {"output": self._output, "usage": usage_of(finished.usage)}
        if whole:
            self.response |= {"status": "completed", "completed_at": int(time.time())}
        else:
            reason = "max_output_tokens" if finished.reason == "length" else None
            self.response |= {"status": "incomplete", "incomplete_details": {"reason": reason}}
        if self._drafting.keep is not None:
            self._drafting.keep(self.response)
        return chunk + self._envelope("completed" if whole else "incomplete")

    def _envelope(self, name: str) -> bytes:
        return self._line({"type": f"response.{name}", "response": self.response})

    def _lines(self, lines: list[dict[str, Any]]) -> bytes:
        assert self._open is not None
        place = {"item_id": self._open.item["id"], "output_index": len(self._output)}
        return b"".join(self._line({**line, **place}) for line in lines)

    def _line(self, values: dict[str, Any]) -> bytes:
        line = sse_event(values["type"], {**values, "sequence_number": self._number})
        self._number += 1
        return line
