"""One request on its way through the engine, seen from asyncio.

Knows the engine's protocol and nothing of HTTP or of a dialect. Called by every route that generates.
"""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Accepted, Event, Failed, Finished
from mlx_optiq_ext.types.port import Engine

__all__ = ["JobFailed", "Run"]


class JobFailed(Exception):
    """The engine refused or lost the job; dialects render :attr:`failed` in their own shape."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class Run:
    """Submits on entering, cancels on leaving; in between the job's events can be iterated once.

    ::

        async with Run(engine, request) as run:
            accepted = await run.accepted()
            async for event in run.events():
                ...

    Leaving early (an exception, a closed stream, a client that went away) cancels the job.
    """

    def __init__(self, engine: Engine, request: Generation) -> None:
        self._engine = engine
        self._request = request
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._job: str | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        queue = self._queue

        def deliver(event: Event) -> None:
            # The loop is closed only after every request is cancelled or the process is leaving anyway.
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self._job = self._engine.submit(self._request, deliver)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._job is not None and not self._ended:
            self._engine.cancel(self._job)

    async def accepted(self) -> Accepted:
        """Wait until the prompt is rendered and fits.

        Raises:
            JobFailed: The engine refuses it.
        """
        event = await self._queue.get()
        if isinstance(event, Failed):
            self._ended = True
            raise JobFailed(event)
        if not isinstance(event, Accepted):
            raise TypeError(f"a job's first event is {type(event).__name__}, not Accepted or Failed")
        return event

    async def events(self, heartbeat_s: float | None = None) -> AsyncIterator[Event | None]:
        """Everything after ``Accepted``, up to and with ``Finished``.

        Args:
            heartbeat_s: Yield None whenever nothing happened for so long.
        Raises:
            JobFailed: The job ended in the middle.
        """
        while True:
            try:
                event = await asyncio.wait_for(self._queue.get(), heartbeat_s)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                self._ended = True
                raise JobFailed(event)
            self._ended = isinstance(event, Finished)
            yield event
            if self._ended:
                return
