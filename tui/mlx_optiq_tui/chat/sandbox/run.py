"""Run one program in the sandbox: start it, feed it, watch what it takes, end it and all that it started.

Knows no launcher's words. Belongs to the event loop that calls it; nothing blocks it. Used by
``sandbox.probe`` and ``tools``.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import ResourceError
from mlx_optiq_tui.chat.sandbox import enter
from mlx_optiq_tui.chat.sandbox.borrowed import Borrowed
from mlx_optiq_tui.chat.sandbox.output import KeptOutput
from mlx_optiq_tui.chat.sandbox.place import Launcher, Place, python_executable, sandbox_environment
from mlx_optiq_tui.chat.sandbox.result import SandboxLimits, SandboxResult
from mlx_optiq_tui.chat.sandbox.syscalls import seccomp_filter
from mlx_optiq_tui.chat.sandbox.usage import (
    FolderUse,
    folder_files,
    folder_use,
    process_use,
    removed_nbytes,
)

__all__ = ["run_confined"]

_SLACK_FILES, _SLACK_NBYTES = 100, 2**20
"""What may come to folders that are full already, so that a program can clear them up."""
_LOOK_S = 0.1
_END_S = 5.0
_MAX_LISTED = 50


async def run_confined(
    launcher: Launcher,
    workspace: Path,
    words: Sequence[str],
    *,
    stdin: bytes = b"",
    limits: SandboxLimits | None = None,
) -> SandboxResult:
    """Run ``words`` where they reach only ``workspace``; nothing of them runs on afterwards.

    Args:
        launcher: One that was proven to work.
        workspace: Made where it is missing.
        words: Program and arguments, as seen inside.
        stdin: All that it can read.
        limits: What it may use.
    Raises:
        ResourceError: The program cannot be started at all.
    """
    limits = limits or SandboxLimits()
    borrowed = await asyncio.to_thread(Borrowed, launcher, workspace.absolute())
    place = borrowed.place
    try:
        before = await asyncio.to_thread(folder_files, place.workspace, limits.files)
        result = await _Run(launcher, place, limits).follow(words, stdin)
        after = await asyncio.to_thread(folder_files, place.workspace, limits.files)
    finally:
        await asyncio.to_thread(borrowed.give_back)
    made = sorted(path for path, told in after.items() if before.get(path) != told)
    return msgspec.structs.replace(result, files=tuple(made[:_MAX_LISTED]))


class _Run:
    def __init__(self, launcher: Launcher, place: Place, limits: SandboxLimits) -> None:
        self._launcher, self._place, self._limits = launcher, place, limits
        self._stop = asyncio.Event()
        self._stopped = ""
        self._pids: set[int] = set()
        self._at_first: FolderUse | None = None

    async def follow(self, words: Sequence[str], stdin: bytes) -> SandboxResult:
        """Start, watch and end it."""
        begun = time.monotonic()
        outputs = [KeptOutput(self._limits, self._too_much_output) for _ in range(2)]
        process = await self._start(words)
        assert process.stdin
        assert process.stdout
        assert process.stderr
        readers = [
            asyncio.create_task(output.follow(stream))
            for output, stream in zip(outputs, (process.stdout, process.stderr), strict=True)
        ]
        feeding = asyncio.create_task(_feed(process.stdin, stdin))
        watchers = [
            asyncio.create_task(self._watch_processes(process.pid)),
            asyncio.create_task(self._watch_files()),
        ]
        ended = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(self._stop.wait())
        tasks = (feeding, *watchers, *readers, stopped)
        try:
            done, _ = await asyncio.wait(
                (ended, stopped, *watchers),
                timeout=self._limits.wall_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                self._end(f"it ran longer than {self._limits.wall_s:g} seconds")
            for watcher in done & set(watchers):
                # Nothing runs that nobody watches.
                watcher.result()
        except OSError as error:
            raise ResourceError(f"the program cannot be watched here: {error}") from error
        finally:
            self._kill(process)
            await asyncio.wait((ended,), timeout=_END_S)
            await asyncio.wait(readers, timeout=_END_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        out, err = outputs
        return SandboxResult(
            exit_code=process.returncode if process.returncode is not None else -signal.SIGKILL,
            stdout=out.text,
            stderr=err.text,
            stdout_dropped=out.dropped_nbytes,
            stderr_dropped=err.dropped_nbytes,
            stopped=self._stopped,
            seconds=time.monotonic() - begun,
        )

    async def _start(self, words: Sequence[str]) -> asyncio.subprocess.Process:
        descriptor = _filter_descriptor() if sys.platform == "linux" else None
        outside = self._launcher.enclose(self._place, descriptor)
        enter_text = Path(enter.__file__).read_text(encoding="utf-8")
        inside = [
            str(python_executable()),
            "-I",
            "-S",
            "-c",
            enter_text,
            self._told(outside.workspace),
            *words,
        ]
        try:
            return await asyncio.create_subprocess_exec(
                *outside.words,
                *inside,
                cwd="/",
                env=sandbox_environment(outside.workspace, outside.scratch),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=() if descriptor is None else (descriptor,),
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(f"cannot start {outside.words[0]}: {error.strerror or error}") from error
        except ValueError as error:
            raise ResourceError(f"no program can be told this: {error}") from error
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _told(self, folder: Path) -> str:
        """What ``enter`` is told."""
        limits, processes = self._limits, self._limits.processes
        if sys.platform == "darwin":
            # Counted over all processes of the user there, not over those of the sandbox.
            processes += len(process_use(1).pids)
        told = {
            "CORE": 0,
            "CPU": limits.cpu_s,
            "FSIZE": limits.file_nbytes,
            "NPROC": processes,
            "NOFILE": limits.open_files,
            "AS": limits.address_space_nbytes,
            "DATA": limits.memory_nbytes,
            "MSGQUEUE": 0,
            "user": self._launcher.user,
            "folder": str(folder),
        }
        if sys.platform == "darwin":
            for name in ("AS", "DATA", "MSGQUEUE"):  # refused, without effect or unknown there
                del told[name]
        return msgspec.json.encode(told).decode()

    async def _watch_processes(self, pid: int) -> None:
        limits = self._limits
        while True:
            used = await asyncio.to_thread(process_use, pid)
            self._pids.update(used.pids)
            if used.resident_nbytes > limits.memory_nbytes:
                self._end(f"it took more than {limits.memory_nbytes / 2**20:g} MiB of memory")
            await asyncio.sleep(_LOOK_S)

    async def _watch_files(self) -> None:
        """What was there before it began is not held against it: it may have been asked to clear up."""
        limits = self._limits
        while True:
            used = await asyncio.to_thread(self._folder_use)
            self._at_first = self._at_first or used
            removed = await asyncio.to_thread(removed_nbytes, tuple(self._pids))
            free = shutil.disk_usage(self._place.workspace).free
            if used.uncountable:
                self._end(f"it made folders that cannot be counted ({used.uncountable})")
            elif used.nbytes + removed > max(limits.disk_nbytes, self._at_first.nbytes + _SLACK_NBYTES):
                self._end(f"its files took more than {limits.disk_nbytes / 2**20:g} MiB")
            elif used.files > max(limits.files, self._at_first.files + _SLACK_FILES):
                self._end(f"it made more than {limits.files} files")
            elif free < limits.spare_nbytes:
                self._end(f"the disk has less than {limits.spare_nbytes / 2**20:g} MiB left")
            await asyncio.sleep(_LOOK_S)

    def _folder_use(self) -> FolderUse:
        """Of workspace and scratch."""
        most = max(self._limits.files, self._at_first.files + _SLACK_FILES) if self._at_first else sys.maxsize
        uses = [folder_use(folder, most) for folder in (self._place.workspace, self._place.scratch)]
        return FolderUse(
            files=sum(each.files for each in uses),
            nbytes=sum(each.nbytes for each in uses),
            uncountable=next((each.uncountable for each in uses if each.uncountable), ""),
        )

    def _too_much_output(self) -> None:
        most = self._limits.output_nbytes + self._limits.dropped_nbytes
        self._end(f"it wrote more than {most / 2**20:.3g} MiB of output")

    def _end(self, why: str) -> None:
        self._stopped = self._stopped or why
        self._stop.set()

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        """End the launcher's process group; with it goes its PID namespace, where it made one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if sys.platform == "darwin":
            for pid in self._pids - {process.pid}:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)


async def _feed(stream: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
    stream.close()


def _filter_descriptor() -> int | None:
    """A file with the system call filter, to be inherited; None where there is none for this machine."""
    program = seccomp_filter()
    if program is None:
        return None
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, program)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
