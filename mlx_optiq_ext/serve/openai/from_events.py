"""From the events of a chat request's jobs to chunks of a stream, or to one document.

Knows the OpenAI dialect and our events, no HTTP. Called through ``serve.sse``.
Source: OpenAI API reference, "Chat completions: streaming"; ``reasoning_content`` as local servers spell it.
"""

import secrets
import time
from typing import Any

from mlx_optiq_ext.serve.openai.chunks import FINISH_REASONS, ChunkStream
from mlx_optiq_ext.serve.openai.usage import UsageSum
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStart,
)

__all__ = ["ChatCollector", "ChatStream"]

_LEAST_LOGPROB = -9999.0
"""Stands for impossible tokens, whose logarithm JSON cannot say."""


class ChatStream(ChunkStream):
    """Writes ``chat.completion.chunk`` events.

    Args:
        num_choices: Answers that the request asks for.
        include_usage: Tell the usage in a chunk of its own before the end.
    """

    def __init__(self, num_choices: int = 1, *, include_usage: bool = False) -> None:
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk"}
        super().__init__(head, UsageSum(num_choices), include_usage=include_usage)
        self._choices = range(num_choices)

    def first(self, accepted: Accepted) -> bytes:
        """The role of each answer, before prefill."""
        self._head |= {"created": int(time.time()), "model": accepted.model}
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(choice, role) for choice in self._choices)

    def feed(self, event: Event, choice: int) -> bytes:
        """A chunk of a delta; with the last end the usage and ``[DONE]``."""
        if isinstance(event, TextDelta):
            return self._chunk(choice, {"content": event.text}, logprobs=_logprobs(event.logprobs))
        if isinstance(event, ReasoningDelta):
            return self._chunk(choice, {"reasoning_content": event.text})
        if isinstance(event, ToolCallStart):
            return self._chunk(choice, {"tool_calls": [_begun_call(event)]})
        if isinstance(event, ToolCallDelta):
            piece = {"index": event.index, "function": {"arguments": event.arguments}}
            return self._chunk(choice, {"tool_calls": [piece]})
        if isinstance(event, Finished):
            return self._chunk(choice, {}, FINISH_REASONS[event.reason]) + self._end(event)
        return b""

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        told: dict[str, Any] = {"index": choice, "delta": delta, "finish_reason": finish_reason}
        if logprobs is not None:
            told["logprobs"] = logprobs
        return self._told(told)


class ChatCollector:
    """Gathers the same events into a ``chat.completion``.

    Args:
        num_choices: Answers that the request asks for.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]
        self._usage = UsageSum(num_choices)
        self._model = ""

    def first(self, accepted: Accepted) -> None:
        """Note who answers."""
        self._model = accepted.model

    def feed(self, event: Event, choice: int) -> None:
        """Take an event."""
        self._choices[choice].feed(event)
        if isinstance(event, Finished):
            self._usage.add(event.usage)

    def answer(self) -> dict[str, Any]:
        """The document."""
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [choice.document(index) for index, choice in enumerate(self._choices)],
            "usage": self._usage.document(),
        }


class _Choice:
    """One answer as it grows."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[TokenLogprob] = []
        self._reason: str | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
            self._logprobs += event.logprobs
        elif isinstance(event, ReasoningDelta):
            self._thoughts.append(event.text)
        elif isinstance(event, ToolCallStart):
            self._calls.append(_begun_call(event))
        elif isinstance(event, ToolCallDelta):
            self._calls[-1]["function"]["arguments"] += event.arguments
        elif isinstance(event, Finished):
            self._reason = FINISH_REASONS[event.reason]

    def document(self, index: int) -> dict[str, Any]:
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if self._calls else "")}
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self._calls]
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(self._logprobs),
            "finish_reason": self._reason,
        }


def _begun_call(call: ToolCallStart) -> dict[str, Any]:
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": ""},
    }


def _logprobs(tokens: "tuple[TokenLogprob, ...] | list[TokenLogprob]") -> dict[str, Any] | None:
    if not tokens:
        return None
    return {"content": [{**_logprob(t), "top_logprobs": [_logprob(o) for o in t.top]} for t in tokens]}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": max(token.logprob, _LEAST_LOGPROB),
        "bytes": list(token.token_bytes),
    }
