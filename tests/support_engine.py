"""An engine that tells what a script says: the port of the HTTP layer without a model."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from mlx_optiq_ext.errors import EngineStopped, OptiqError
from mlx_optiq_ext.types.chat import Generation, Text
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    Prefilled,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from mlx_optiq_ext.types.port import Embeddings, LogLine
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus, ServedModel

__all__ = ["CALL_ID", "FakeEngine", "Script", "Until", "answer", "call", "ready_status"]

T = TypeVar("T")

CALL_ID = "call0123456789abcdefghijkl"
PROMPT_TOKENS = 100
CACHED_TOKENS = 64


class Until:
    """A step of a script: wait until somebody sets it, or the job is cancelled."""

    def __init__(self) -> None:
        self.go = threading.Event()


Script = Callable[[Generation], Iterable[Event | float | Until]]
"""What to tell of a request after ``Accepted``: an event, seconds to wait, or something to wait for. A script
that begins with ``Failed`` refuses."""


def answer(
    *deltas: str | Event, reason: FinishReason = "stop", stop_sequence: str | None = None, reasoning: str = ""
) -> Script:
    """A script: prefill in two steps, reasoning where there is any, the deltas, the end with usage."""

    def script(request: Generation) -> Iterator[Event]:
        yield Started(cached_tokens=CACHED_TOKENS)
        yield Prefilled(done=80, total=PROMPT_TOKENS)
        yield Prefilled(done=PROMPT_TOKENS, total=PROMPT_TOKENS)
        if reasoning:
            yield ReasoningDelta(text=reasoning)
        for delta in deltas:
            yield TextDelta(text=delta) if isinstance(delta, str) else delta
        usage = Usage(
            prompt_tokens=PROMPT_TOKENS,
            cached_tokens=CACHED_TOKENS,
            completion_tokens=12,
            reasoning_tokens=4 if reasoning else 0,
        )
        yield Finished(reason=reason, usage=usage, stop_sequence=stop_sequence)

    return script


def call(name: str, *arguments: str, index: int = 0, id: str = CALL_ID) -> tuple[Event, ...]:
    """The events of one tool call whose arguments stream in these pieces."""
    return (
        ToolCallStart(index=index, id=id, name=name),
        *(ToolCallDelta(index=index, arguments=piece) for piece in arguments),
        ToolCallEnd(index=index, id=id, name=name, arguments="".join(arguments)),
    )


def ready_status(*, context: int = 4096, state: str = "ready") -> EngineStatus:
    """One loaded model, ``org/tiny``, with an adapter, and one that is not loaded."""
    tiny = ServedModel(
        id="org/tiny",
        source="org/tiny",
        loaded=True,
        created=1_700_000_000,
        context=context,
        weights_nbytes=1_000_000,
        bpw=4.5,
        kv_bits=4.5,
        adapters=("terse",),
        calls_tools=True,
        thinks=True,
    )
    other = ServedModel(id="other", source="other", loaded=False, created=1_600_000_000, context=0)
    return EngineStatus(state=state, version="0.0.0", uptime_s=1.0, models=(tiny, other))  # type: ignore[arg-type]


class FakeEngine:
    """Implements ``types.port.Engine``. Every job tells its script on a thread of its own.

    Args:
        scripts: Used in turn, the last one for ever; by default each answer is ``Hello world``.
        status: What :meth:`status` says.
        refuse: Raised by every method that takes a request.
    """

    def __init__(
        self, *scripts: Script, status: EngineStatus | None = None, refuse: OptiqError | None = None
    ) -> None:
        self.requests: list[Generation] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.called: list[str] = []
        self.now = status or ready_status()
        self.refuse = refuse
        self._scripts = list(scripts) or [answer("Hello", " world")]
        self._numbers = itertools.count(1)
        self._stops: dict[str, threading.Event] = {}
        self._lines: list[LogLine] = []

    def submit(self, request: Generation, deliver: EventSink) -> str:
        """Start telling the next script."""
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        job = f"job{next(self._numbers)}"
        stop = self._stops[job] = threading.Event()
        threading.Thread(
            target=self._tell, args=(job, script(request), deliver, stop, request.model), daemon=True
        ).start()
        return job

    def cancel(self, job: str) -> None:
        """Note it and stop telling but the end."""
        self.cancelled.append(job)
        self._stops[job].set()

    def count_tokens(self, request: Generation) -> "Future[int]":
        """Words of all texts, at least one."""
        self.requests.append(request)
        texts = [p.text for m in request.messages for p in m.parts if isinstance(p, Text)]
        return self._future(max(1, len(" ".join(texts).split())))

    def embed(self, model: str, inputs: tuple[str | tuple[int, ...], ...]) -> "Future[Embeddings]":
        """Vectors of four numbers, the first of them the input's length."""
        vectors = tuple((float(len(each)), 0.0, 3.0, 4.0) for each in inputs)
        return self._future(
            Embeddings(model=model or "org/tiny", vectors=vectors, prompt_tokens=sum(map(len, inputs)))
        )

    def status(self) -> EngineStatus:
        """What the test set."""
        return self.now

    def load(self, model: str) -> "Future[None]":
        """Note it."""
        self.called.append(f"load {model}")
        return self._future(None)

    def unload(self, model: str) -> "Future[None]":
        """Note it."""
        self.called.append(f"unload {model}")
        return self._future(None)

    def mount(self, name: str, source: str, model: str = "") -> "Future[AdapterStatus]":
        """Pretend to."""
        self.called.append(f"mount {name} {source} {model}".strip())
        return self._future(AdapterStatus(name=name, model="org/tiny", source=source, rank=8))

    def unmount(self, name: str, model: str = "") -> "Future[None]":
        """Pretend to."""
        self.called.append(f"unmount {name} {model}".strip())
        return self._future(None)

    def use(self, name: str | None, model: str = "") -> "Future[None]":
        """Pretend to."""
        self.called.append(f"use {name} {model}".strip())
        return self._future(None)

    def clear_prefix_cache(self) -> "Future[int]":
        """Note it; 4,096 bytes were held."""
        self.called.append("clear")
        return self._future(4096)

    def log_lines(self, after: int = 0) -> tuple[LogLine, ...]:
        """What :meth:`log` added."""
        return tuple(line for line in self._lines if line.number > after)

    def log(self, text: str, level: str = "INFO") -> None:
        """Add a line."""
        self._lines.append(LogLine(number=len(self._lines) + 1, time=1.5, level=level, text=text))

    def drain(self, timeout_s: float) -> bool:
        """Say that it drains, and wait for the jobs."""
        self.now = msgspec.structs.replace(self.now, state="draining")
        self.refuse = EngineStopped("the server is stopping", retry_after_s=3.0)
        until = time.monotonic() + timeout_s
        while len(self.ended) < len(self._stops) and time.monotonic() < until:
            time.sleep(0.01)
        return len(self.ended) == len(self._stops)

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop all jobs."""
        self.called.append("close")
        for stop in self._stops.values():
            stop.set()

    def _future(self, value: T) -> "Future[T]":
        future: Future[T] = Future()
        if self.refuse is not None:
            future.set_exception(self.refuse)
        else:
            future.set_result(value)
        return future

    def _tell(
        self,
        job: str,
        steps: Iterable[Event | float | Until],
        deliver: EventSink,
        stop: threading.Event,
        model: str,
    ) -> None:
        begun, deltas = False, 0
        for step in steps:
            if not begun and not isinstance(step, Failed):
                deliver(Accepted(prompt_tokens=PROMPT_TOKENS, model=model or "org/tiny"))
            begun = True
            if isinstance(step, float | int):
                stop.wait(step)
            elif isinstance(step, Until):
                while not (stop.is_set() or step.go.wait(0.005)):
                    pass
            elif not stop.is_set():
                deltas += isinstance(step, TextDelta)
                deliver(step)
            if stop.is_set():
                usage = Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=deltas)
                if job in self.cancelled:
                    deliver(Finished(reason="cancelled", usage=usage))
                else:
                    failed = Failed.of(EngineStopped("the server is stopping", retry_after_s=2.0))
                    deliver(msgspec.structs.replace(failed, completion_tokens=deltas))
                break
        self.ended.append(job)
