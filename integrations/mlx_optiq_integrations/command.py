"""Run one of our own commands as a process of its own, and follow it.

Knows how commands talk to programs (``--json --progress-json``: progress as JSON lines on stderr, one
document on stdout) and no command. Used by what must stay responsive meanwhile: ``optiq mcp``, the dashboard.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from mlx_optiq_ext.errors import OptiqError

__all__ = ["CommandFailed", "CommandProgress", "RunningCommand"]

_MAX_NOTES = 200
_LINE_LIMIT = 16 * 2**20
"""Bytes: a line of progress may hold a whole rank map."""


class CommandProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One progress line (``JsonProgress`` in ``mlx_optiq_ext/progress_line.py``)."""

    stage: str
    done: int
    total: int
    detail: str = ""
    replayed: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    values: dict[str, float] = {}
    """Figures of this step, such as a training loss."""


class CommandFailed(OptiqError):
    """The command ended with an exit code other than 0; its message is the command's own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class RunningCommand:
    """A command that runs in a process group of its own.

    Belongs to the event loop that started it. What it says is kept: the newest progress, the notes (at most
    the last 200), other JSON lines by their first key, and at the end the result.

    Args:
        words: Command and arguments without ``optiq``, such as ``("measure", "DIR")``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.progress: CommandProgress | None = None
        self.notes: list[str] = []
        self.said: dict[str, Any] = {}
        self.result: Any = None
        self.was_stopped = False
        self._process: asyncio.subprocess.Process | None = None
        self.exit_code: int | None = None
        self.started = 0.0
        self.ended: float | None = None
        self._follower: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def is_running(self) -> bool:
        """Between :meth:`start` and its end."""
        return self._follower is not None and self.exit_code is None

    async def start(self) -> None:
        """Start the process and follow it in the background."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mlx_optiq_ext",
            *self.words,
            "--json",
            "--progress-json",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_LINE_LIMIT,
        )
        self.started = time.monotonic()
        self._follower = asyncio.create_task(self._follow(self._process))

    async def wait(self) -> Any:
        """Its result, when it has ended.

        Raises:
            CommandFailed: It failed or was stopped.
        """
        if self._follower is None:
            raise RuntimeError("the command was not started")
        await asyncio.shield(self._follower)
        if self.exit_code:
            raise CommandFailed(self._why(self.exit_code), self.exit_code)
        return self.result

    async def changes(self) -> AsyncIterator[CommandProgress]:
        """Progress as it comes, skipping what came while the reader was busy; ends with the command."""
        seen: CommandProgress | None = None
        while True:
            changed = self._changed
            if self.progress is not None and self.progress is not seen:
                seen = self.progress
                yield seen
            elif self.is_running:
                await changed.wait()
            else:
                return

    def stop(self) -> None:
        """Ask it to stop: it saves what it can go on from; the same command then continues."""
        self.was_stopped = self.was_stopped or self.is_running
        self._signal(signal.SIGTERM)

    async def close(self, grace_s: float = 20.0) -> None:
        """Stop it, and kill it where it does not stop by itself in time."""
        if self._follower is None or not self.is_running:
            return
        self.stop()
        try:
            await asyncio.wait_for(asyncio.shield(self._follower), grace_s)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._follower

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        out, _ = await asyncio.gather(process.stdout.read(), self._read_progress(process.stderr))
        with contextlib.suppress(msgspec.DecodeError):
            self.result = msgspec.json.decode(out)
        code = await process.wait()
        self.ended, self.exit_code = time.monotonic(), code
        self._notify()

    async def _read_progress(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self._take(line.decode("utf-8", "replace").rstrip())
            self._notify()

    def _take(self, line: str) -> None:
        try:
            document = msgspec.json.decode(line)
        except msgspec.DecodeError:
            document = {"note": line}
        if not isinstance(document, dict):
            document = {"note": line}
        if "stage" in document:
            self.progress = msgspec.convert(document, CommandProgress)
        elif "note" in document:
            self.notes = [*self.notes[1 - _MAX_NOTES :], str(document["note"])]
        else:
            self.said.update(document)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _why(self, code: int) -> str:
        if isinstance(self.result, dict) and isinstance(self.result.get("error"), dict):
            return str(self.result["error"].get("message", ""))
        if self.was_stopped:
            return "stopped; the same command goes on from here"
        said = "; ".join(line for line in self.notes[-3:] if line)
        if code < 0:
            said = f"ended by {_signal_name(-code)}" + (f" after: {said}" if said else "")
            hint = "; the system may have been out of memory" if -code == signal.SIGKILL else ""
            return f"{said}{hint}; the same command goes on from what it saved"
        return said or f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
