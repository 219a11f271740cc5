"""Long work of the dashboard: commands of ours that run on when the screen that started them is left.

Knows processes and no widget. The app owns the list, shows it and stops what still runs when it ends; the
quantize and fine-tune screens start jobs and draw them.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from mlx_optiq_integrations.command import CommandFailed, CommandProgress, RunningCommand

__all__ = ["Job", "JobState", "Jobs"]

JobState: TypeAlias = Literal["running", "finished", "stopped", "failed"]


class Job:
    """One command: what it does, how far it is, what came out.

    Belongs to the event loop that started it.

    Args:
        number: Counts up.
        title: For people: ``Measure SmolLM2-135M``.
        command: The process; its ``notes``, ``said`` and ``words`` may be read.
    """

    def __init__(self, number: int, title: str, command: RunningCommand) -> None:
        self.number = number
        self.title = title
        self.command = command
        self.state: JobState = "running"
        self.result: Any = None
        """The document of ``--json``, once finished."""
        self.error = ""
        """The command's own words, where it failed or was stopped."""

    @property
    def progress(self) -> CommandProgress | None:
        """The newest step; None before the first."""
        return self.command.progress

    def stop(self) -> None:
        """Ask it to stop: it saves what it can go on from; the same command then goes on."""
        self.command.stop()

    async def follow(self, changed: Callable[["Job"], None]) -> None:
        """Call ``changed`` at every step and once at the end."""
        async for _ in self.command.changes():
            changed(self)
        try:
            self.result = await self.command.wait()
            self.state = "finished"
        except CommandFailed as error:
            self.error = str(error)
            self.state = "stopped" if self.command.was_stopped else "failed"
        changed(self)


class Jobs:
    """All jobs of this run of the dashboard, oldest first.

    Args:
        changed: Called on the event loop at every step of a job and once when it ends.
    """

    def __init__(self, changed: Callable[[Job], None]) -> None:
        self._changed = changed
        self._numbers = itertools.count(1)
        self._followers: set[asyncio.Task[None]] = set()
        self.all: list[Job] = []

    @property
    def running(self) -> list[Job]:
        """Those that have not ended."""
        return [job for job in self.all if job.state == "running"]

    async def start(self, title: str, words: Sequence[str]) -> Job:
        """Start a command.

        Args:
            title: For people.
            words: Command and arguments without ``optiq``, ``--json`` and ``--progress-json``.
        """
        command = RunningCommand(words)
        await command.start()
        job = Job(next(self._numbers), title, command)
        self.all.append(job)
        follower = asyncio.create_task(job.follow(self._changed))
        self._followers.add(follower)
        follower.add_done_callback(self._followers.discard)
        self._changed(job)
        return job

    async def close(self) -> None:
        """Stop all that run and wait until they have saved what they can go on from."""
        await asyncio.gather(*(job.command.close() for job in self.running))
        await asyncio.gather(*self._followers)
