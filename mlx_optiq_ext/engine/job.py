"""One request inside the engine: where it is, what it has used, and how its events leave.

Made by ``engine``, filled by the prompt thread, run by the owner thread. Knows no MLX.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import (
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
    Usage,
)
from mlx_optiq_ext.types.status import RowStatus

if TYPE_CHECKING:  # these import MLX or a tokenizer
    from mlx_optiq_ext.engine.adapters import Mounted
    from mlx_optiq_ext.engine.decode import AnswerDecoder
    from mlx_optiq_ext.engine.prompt import Rendered
    from mlx_optiq_ext.engine.snapshot import Checkpoint

__all__ = ["Job", "failed"]

_SHOWN = (TextDelta, ReasoningDelta, ToolCallStart)


class Job:
    """One request.

    Args:
        name: Unique in this process.
        request: What is asked for.
        deliver: Takes its events.
        model: Name of the model that answers.
    """

    def __init__(self, name: str, request: Generation, deliver: EventSink, model: str) -> None:
        self.name = name
        self.request = request
        self.model = model
        self.created = time.monotonic()
        self.first_token: float | None = None
        self.state: Literal["queued", "prefill", "decode"] = "queued"
        self.cancelled = False
        """Set from any thread; the owner looks before every step."""
        self.ended = False
        self.counted = False
        """Whether its time to the first token is in the counters."""
        self.rendered: Rendered | None = None
        self.processors: list[Any] = []
        self.max_tokens = 0
        self.decoder: AnswerDecoder | None = None
        self.guard: Any = None
        self.checkpoints: dict[int, Checkpoint] = {}
        self.cached_tokens = 0
        self.prefilled_tokens = 0
        self.known_tokens = 0
        self.looked_up = -1
        """State of the prefix cache in which ``known_tokens`` of the prompt were there."""
        self.adapter: Mounted | None = None
        self.release: Callable[[], None] = lambda: None
        """Lets go of the adapter, once, when the job has ended."""
        self.completion_tokens = 0
        self._deliver = deliver

    @property
    def prompt(self) -> tuple[int, ...]:
        """Prompt tokens; empty until it is rendered."""
        return self.rendered.tokens if self.rendered is not None else ()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            reasoning_tokens=self.decoder.reasoning_tokens if self.decoder is not None else 0,
        )

    def emit(self, event: Event) -> None:
        """Hand an event over; after the last one nothing more leaves."""
        if self.ended:
            return
        if self.first_token is None and isinstance(event, _SHOWN):
            self.first_token = time.monotonic()
        self.ended = isinstance(event, Finished | Failed)
        self._deliver(event)

    def finish(self, reason: FinishReason, stop_sequence: str | None = None) -> None:
        """End with an answer."""
        self.emit(Finished(reason=reason, usage=self.usage, stop_sequence=stop_sequence))

    def has_left(self) -> bool:
        """Whether it was cancelled; ends it then."""
        if self.cancelled:
            self.finish("cancelled")
        return self.cancelled

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.emit(msgspec.structs.replace(failed(error), completion_tokens=self.completion_tokens))

    def row(self) -> RowStatus:
        """What the dashboard shows of it."""
        now = time.monotonic()
        decoding = now - self.first_token if self.first_token is not None else 0.0
        return RowStatus(
            id=self.name,
            model=self.model,
            adapter=(self.adapter.name or None) if self.adapter is not None else None,
            state=self.state,
            session=self.request.session,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            prefilled_tokens=self.prefilled_tokens,
            completion_tokens=self.completion_tokens,
            tokens_per_s=self.completion_tokens / decoding if decoding > 0 else 0.0,
            age_s=now - self.created,
            first_token_s=self.first_token - self.created if self.first_token is not None else None,
        )


def failed(error: Exception) -> Failed:
    """An error as an event: ours with their own words, others without what they may tell of this machine."""
    if isinstance(error, OptiqError):
        return Failed.of(error)
    return Failed(
        kind=type(error).__name__,
        message=f"the model failed on this request ({type(error).__name__}); the server's log says more",
        status=500,
    )
