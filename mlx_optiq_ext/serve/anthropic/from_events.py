"""From the events of a job to a message of the Anthropic dialect: as a stream, or whole.

One state machine numbers the content blocks and keeps them; the stream sends what it adds, the whole message
is what it kept. Called by the routes through ``serve.sse``.
"""

import secrets
from typing import Any

import msgspec

from mlx_optiq_ext.serve.anthropic.errors import error_body
from mlx_optiq_ext.serve.sse import sse_event
from mlx_optiq_ext.serve.unseen import conceal
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    Failed,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)

__all__ = ["MessageStream"]

STOP_REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "stop_sequence": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "cancelled": "pause_turn",
}


class MessageStream:
    """Writes a message as server-sent events and keeps it.

    Args:
        omit_thinking: Show no thoughts; the signature of their block carries them instead.
        request_id: Said again in an error, for the log.
    """

    def __init__(self, *, omit_thinking: bool = False, request_id: str = "") -> None:
        self._omit_thinking = omit_thinking
        self._request_id = request_id
        self._content: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {}
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._arguments: list[str] = []
        self._open: str | None = None

    def first(self, accepted: Accepted) -> bytes:
        """Render ``message_start``; cached tokens are not known yet and count as read anew."""
        self._message = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": accepted.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens=accepted.prompt_tokens)),
        }
        return _line("message_start", message=self._message) + self.heartbeat()

    def heartbeat(self) -> bytes:
        """Render ``ping``."""
        return _line("ping")

    def feed(self, event: Event, choice: int = 0) -> bytes:  # noqa: ARG002 - there is one answer, number 0
        """Render what an event adds."""
        match event:
            case TextDelta(text=text) if text:
                return self._begin("text", text="") + self._text(text)
            case ReasoningDelta(text=text) if text:
                return self._begin("thinking", thinking="", signature="") + self._thought(text)
            case ToolCallStart():
                return self._close() + self._start_call(event)
            case ToolCallDelta(arguments=arguments) if arguments:
                self._arguments.append(arguments)
                return self._delta("input_json_delta", partial_json=arguments)
            case ToolCallEnd(arguments=arguments):
                self._content[-1]["input"] = msgspec.json.decode(arguments or "{}")
                return self._close()
            case Finished():
                is_cut = self._open == "tool_use"
                closed = self._close()
                if is_cut:
                    self._content[-1] = self._cut_call(self._content[-1]["name"])
                return closed + self._finish(event)
            case _:
                return b""

    def failed(self, failed: Failed) -> bytes:
        """Render the error that ends the stream."""
        return sse_event("error", error_body(failed, self._request_id))

    def message(self) -> dict[str, Any]:
        """The whole message, once it is finished."""
        return {**self._message, "content": self._content}

    def _begin(self, kind: str, **empty: Any) -> bytes:
        if self._open == kind:
            return b""
        return self._close() + self._start({"type": kind, **empty})

    def _start(self, block: dict[str, Any]) -> bytes:
        self._open = block["type"]
        self._content.append(block)
        return _line("content_block_start", index=len(self._content) - 1, content_block=block)

    def _delta(self, kind: str, **values: str) -> bytes:
        return _line("content_block_delta", index=len(self._content) - 1, delta={"type": kind, **values})

    def _text(self, text: str) -> bytes:
        self._texts.append(text)
        return self._delta("text_delta", text=text)

    def _thought(self, text: str) -> bytes:
        self._thoughts.append(text)
        return b"" if self._omit_thinking else self._delta("thinking_delta", thinking=text)

    def _cut_call(self, name: str) -> dict[str, Any]:
        """What stands for a call that was cut: a whole message can hold only whole calls."""
        return {"type": "text", "text": f"[cut: {name} {''.join(self._arguments)}]"}

    def _start_call(self, call: ToolCallStart) -> bytes:
        self._arguments.clear()
        name_of_call = f"toolu_{call.id.removeprefix('call')}"
        return self._start({"type": "tool_use", "id": name_of_call, "name": call.name, "input": {}})

    def _close(self) -> bytes:
        """End the open block, with the signature where it holds thoughts, and keep it whole."""
        if self._open is None:
            return b""
        block, chunk = self._content[-1], b""
        if self._open == "text":
            block["text"] = "".join(self._texts)
            self._texts.clear()
        elif self._open == "thinking":
            thoughts = "".join(self._thoughts)
            self._thoughts.clear()
            block["thinking"] = "" if self._omit_thinking else thoughts
            block["signature"] = conceal(thoughts if self._omit_thinking else "")
            chunk = self._delta("signature_delta", signature=block["signature"])
        self._open = None
        return chunk + _line("content_block_stop", index=len(self._content) - 1)

    def _finish(self, finished: Finished) -> bytes:
        stop = {"stop_reason": STOP_REASONS[finished.reason], "stop_sequence": finished.stop_sequence}
        usage = _usage(finished.usage)
        self._message |= {**stop, "usage": usage}
        return _line("message_delta", delta=stop, usage=usage) + _line("message_stop")


def _line(kind: str, **values: Any) -> bytes:
    return sse_event(kind, {"type": kind, **values})


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
