"""One request on its way through the engine, seen from asyncio; several where it asks for several answers.

Knows the engine's protocol and nothing of HTTP or of a dialect. Called by every route that generates.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Accepted, Event, EventSink, Failed, Finished
from mlx_optiq_ext.types.port import Engine

__all__ = ["JobFailed", "Run"]


class JobFailed(Exception):
    """The engine refused or lost the job; dialects render :attr:`failed` in their own shape."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class Run:
    """Submits on entering, cancels on leaving; in between the jobs' events can be iterated once.

    ::

        async with Run(engine, request) as run:
            accepted = await run.accepted()
            async for told in run.events():
                ...

    Leaving early (an exception, a closed stream, a client that went away) cancels what has not ended.

    Args:
        engine: Who runs them.
        requests: One per answer; an event tells by its place here which of them it belongs to.
    """

    def __init__(self, engine: Engine, *requests: Generation) -> None:
        self._engine = engine
        self._requests = requests
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._waiting: list[tuple[int, Event]] = []
        self._jobs: dict[int, str] = {}
        self._cancelled: set[int] = set()

    async def __aenter__(self) -> Self:
        try:
            for index, request in enumerate(self._requests):
                self._jobs[index] = self._engine.submit(request, self._deliver(index))
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    @property
    def jobs(self) -> tuple[str, ...]:
        """The engine's names of those that run, in the order of the requests."""
        return tuple(self._jobs.values())

    async def accepted(self) -> list[Accepted]:
        """Wait until every prompt is rendered and fits; what each says of itself, in order.

        Raises:
            JobFailed: The engine refuses one.
        """
        accepted: dict[int, Accepted] = {}
        while len(accepted) < len(self._requests):
            index, event = await self._next()
            if isinstance(event, Accepted):
                accepted[index] = event
            elif index in accepted:
                self._waiting.append((index, event))
            else:
                raise TypeError(f"a job's first event is {type(event).__name__}, not Accepted or Failed")
        return [accepted[index] for index in range(len(self._requests))]

    async def events(self, heartbeat_s: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """Everything after ``Accepted``, up to and with the last ``Finished``, each with its answer's index.

        Args:
            heartbeat_s: Yield None whenever nothing happened for so long.
        Raises:
            JobFailed: A job ended in the middle.
        """
        for told in self._waiting:
            self._note_end(*told)
            yield told
        while self._jobs:
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that meets an event.
                async with asyncio.timeout(heartbeat_s):
                    told = await self._next()
            except TimeoutError:
                yield None
                continue
            self._note_end(*told)
            yield told

    async def last_events(self, timeout_s: float) -> list[Event]:
        """What cancelled jobs still told, up to their ends, which say what they took.

        Args:
            timeout_s: How long to wait for the ends.
        """
        told: list[Event] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._cancelled:
                    index, event = await self._queue.get()
                    told.append(event)
                    if isinstance(event, Finished | Failed):
                        self._cancelled.discard(index)
        return told

    def _deliver(self, index: int) -> EventSink:
        loop = asyncio.get_running_loop()
        queue = self._queue

        def deliver(event: Event) -> None:
            # The loop is closed only after every request is cancelled or the process is leaving anyway.
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        return deliver

    async def _next(self) -> tuple[int, Event]:
        index, event = await self._queue.get()
        if isinstance(event, Failed):
            self._jobs.pop(index, None)
            raise JobFailed(event)
        return index, event

    def _note_end(self, index: int, event: Event) -> None:
        if isinstance(event, Finished):
            del self._jobs[index]

    def _cancel(self) -> None:
        for job in self._jobs.values():
            self._engine.cancel(job)
        self._cancelled.update(self._jobs)
        self._jobs.clear()
