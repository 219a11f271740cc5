"""What chat and legacy completion streams have in common: their head, their end, their errors.

Source: OpenAI API reference, "Chat completions: streaming".
"""

from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.serve.openai.errors import error_body
from mlx_optiq_ext.serve.openai.usage import UsageSum
from mlx_optiq_ext.serve.sse import sse_event
from mlx_optiq_ext.types.events import Failed, Finished, FinishReason

__all__ = ["DONE", "FINISH_REASONS", "KEEPALIVE", "ChunkStream"]

FINISH_REASONS: Mapping[FinishReason, str] = {
    "stop": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    # The server ended it: the answer is cut short, as by a limit.
    "cancelled": "length",
}
DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"


class ChunkStream:
    """Writes chunks with one choice each.

    Args:
        head: What every chunk begins with.
        usage: Adds up the answers.
        include_usage: Tell the usage in a chunk of its own before the end.
    """

    def __init__(self, head: dict[str, Any], usage: UsageSum, *, include_usage: bool) -> None:
        self._head = head
        self._usage = usage
        self._include_usage = include_usage

    def heartbeat(self) -> bytes:
        """A comment, which every client skips."""
        return KEEPALIVE

    def failed(self, failed: Failed) -> bytes:
        """The error that ends the stream."""
        return sse_event(None, error_body(failed))

    def _told(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return sse_event(None, {**self._head, "choices": [choice], **usage})

    def _end(self, finished: Finished) -> bytes:
        """With the last end the usage and ``[DONE]``."""
        if not self._usage.add(finished.usage):
            return b""
        if not self._include_usage:
            return DONE
        return sse_event(None, {**self._head, "choices": [], "usage": self._usage.document()}) + DONE
