"""Long commands that an agent starts and asks about later: an MCP call must not last for hours.

Knows nothing of MCP. Used by ``mcp_server``.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_integrations.command import CommandFailed, CommandProgress, RunningCommand

__all__ = ["Jobs", "OnProgress", "run_short"]

OnProgress: TypeAlias = Callable[[CommandProgress], Awaitable[None]]

_MAX_RUNNING = 4
_MAX_KEPT = 50
_SHOWN_NOTES = 5


class Jobs:
    """Commands by a short name; belongs to one event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, RunningCommand] = {}
        self._numbers = itertools.count(1)

    async def start(self, words: Sequence[str]) -> str:
        """Start a command; its name.

        Raises:
            UsageError: Too many run already.
        """
        running = [name for name, job in self._jobs.items() if job.is_running]
        if len(running) >= _MAX_RUNNING:
            raise UsageError(f"{len(running)} jobs run already ({', '.join(running)}); stop one, or wait")
        for name in [name for name, job in self._jobs.items() if not job.is_running][: 1 - _MAX_KEPT]:
            del self._jobs[name]
        command = RunningCommand(words)
        await command.start()
        name = f"{words[0]}-{next(self._numbers)}"
        self._jobs[name] = command
        return name

    async def wait(self, name: str, seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """What a job has done, as soon as it ends and at most after ``seconds``.

        Raises:
            UsageError: No such job.
        """
        job = self._find(name)

        async def follow() -> None:
            async for progress in job.changes():
                await on_progress(progress)

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(follow(), max(seconds, 0.0))
        return await self._view(name)

    async def stop(self, name: str) -> dict[str, Any]:
        """Stop a job and wait until it has saved what it can go on from.

        Raises:
            UsageError: No such job.
        """
        await self._find(name).close()
        return await self._view(name)

    async def views(self) -> list[dict[str, Any]]:
        """All jobs, newest last."""
        return [await self._view(name) for name in self._jobs]

    async def close(self) -> None:
        """Stop all of them."""
        await asyncio.gather(*(job.close() for job in self._jobs.values()))

    def _find(self, name: str) -> RunningCommand:
        if name not in self._jobs:
            raise UsageError(f"no job {name!r}; jobs are {', '.join(self._jobs) or 'none'}")
        return self._jobs[name]

    async def _view(self, name: str) -> dict[str, Any]:
        job = self._jobs[name]
        view: dict[str, Any] = {
            "job": name,
            "command": ["optiq", *job.words],
            "state": "running",
            "seconds": round((job.ended or time.monotonic()) - job.started, 1),
            "progress": msgspec.to_builtins(job.progress) if job.progress is not None else None,
            "notes": job.notes[-_SHOWN_NOTES:],
        }
        if not job.is_running:
            try:
                view |= {"result": _brief(await job.wait()), "state": "finished"}
            except CommandFailed as error:
                view |= {"error": str(error), "state": "stopped" if job.was_stopped else "failed"}
        return view


def _brief(result: Any) -> Any:
    """A result without its list of every tensor, which fills an agent's context; ``report`` has it."""
    if isinstance(result, dict) and isinstance(result.get("allocation"), dict):
        rest = {name: value for name, value in result["allocation"].items() if name != "bit_map"}
        return {**result, "allocation": rest}
    return result


async def run_short(words: Sequence[str]) -> Any:
    """Run a command that takes seconds; its result.

    Raises:
        CommandFailed: It failed.
    """
    command = RunningCommand(words)
    await command.start()
    try:
        return await command.wait()
    finally:
        await command.close()
