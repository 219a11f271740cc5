"""From the events of a legacy completion's jobs to chunks of a stream, or to one document.

Knows the OpenAI dialect and our events, no HTTP. Called through ``serve.sse``.
Source: OpenAI API reference, "Completions (legacy)".
"""

import secrets
import time
from collections.abc import Sequence
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
)

__all__ = ["CompletionCollector", "CompletionStream"]


class CompletionStream(ChunkStream):
    """Writes ``text_completion`` events.

    Args:
        echoes: What each answer begins with: its prompt, or nothing.
        usage: Adds up the answers.
        include_usage: Tell the usage in a chunk of its own before the end.
    """

    def __init__(self, echoes: Sequence[str], usage: UsageSum, *, include_usage: bool = False) -> None:
        super().__init__(_head(), usage, include_usage=include_usage)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]

    def first(self, accepted: Accepted) -> bytes:
        """What each answer begins with, before prefill."""
        self._head["model"] = accepted.model
        return b"".join(self._chunk(choice, echo) for choice, echo in enumerate(self._echoes))

    def feed(self, event: Event, choice: int) -> bytes:
        """A chunk of a delta; with the last end the usage and ``[DONE]``."""
        if isinstance(event, TextDelta | ReasoningDelta):
            logprobs = _logprobs(event.logprobs, self._offsets[choice])
            self._offsets[choice] += len(event.text)
            return self._chunk(choice, event.text, logprobs=logprobs)
        if isinstance(event, Finished):
            return self._chunk(choice, "", FINISH_REASONS[event.reason]) + self._end(event)
        return b""

    def _chunk(
        self, choice: int, text: str, reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        return self._told({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason})


class CompletionCollector:
    """Gathers the same events into one ``text_completion``.

    Args:
        echoes: What each answer begins with: its prompt, or nothing.
        usage: Adds up the answers.
    """

    def __init__(self, echoes: Sequence[str], usage: UsageSum) -> None:
        self._usage = usage
        self._head = _head()
        self._begin = [len(echo) for echo in echoes]
        self._texts = [[echo] for echo in echoes]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in echoes]
        self._reasons: list[str | None] = [None for _ in echoes]

    def first(self, accepted: Accepted) -> None:
        """Note who answers."""
        self._head["model"] = accepted.model

    def feed(self, event: Event, choice: int) -> None:
        """Take an event."""
        if isinstance(event, TextDelta | ReasoningDelta):
            self._texts[choice].append(event.text)
            self._logprobs[choice] += event.logprobs
        elif isinstance(event, Finished):
            self._reasons[choice] = FINISH_REASONS[event.reason]
            self._usage.add(event.usage)

    def answer(self) -> dict[str, Any]:
        """The document."""
        choices = [
            {
                "index": index,
                "text": "".join(self._texts[index]),
                "logprobs": _logprobs(self._logprobs[index], begin),
                "finish_reason": self._reasons[index],
            }
            for index, begin in enumerate(self._begin)
        ]
        return {**self._head, "choices": choices, "usage": self._usage.document()}


def _head() -> dict[str, Any]:
    return {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """The legacy shape: four lists; ``text_offset`` counts characters from the start of the text."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{other.token: other.logprob for other in token.top} for token in tokens],
        "text_offset": offsets,
    }
