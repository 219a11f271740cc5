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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import ResourceError
from mlx_optiq_tui.chat.sandbox import enter
from mlx_optiq_tui.chat.sandbox.output import KeptOutput
from mlx_optiq_tui.chat.sandbox.place import Launcher, Place, python_executable, sandbox_environment
from mlx_optiq_tui.chat.sandbox.result import SandboxLimits, SandboxResult
from mlx_optiq_tui.chat.sandbox.syscalls import seccomp_filter
from mlx_optiq_tui.chat.sandbox.usage import folder_files, folder_use, process_use

__all__ = ["run_confined"]

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
    workspace = workspace.absolute()
    workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = await asyncio.to_thread(folder_files, workspace, limits.files)
    scratch = Path(tempfile.mkdtemp(prefix="optiq-sandbox-")).resolve()
    place = Place(workspace=workspace.resolve(), scratch=scratch)
    try:
        if launcher.user is not None:
            for folder in (place.workspace, place.scratch):
                os.chown(folder, launcher.user, launcher.user)
        run = _Run(launcher, place, limits)
        result = await run.follow(words, stdin)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
    after = await asyncio.to_thread(folder_files, workspace, limits.files)
    made = sorted(path for path, told in after.items() if before.get(path) != told)
    return msgspec.structs.replace(result, files=tuple(made[:_MAX_LISTED]))


class _Run:
    def __init__(self, launcher: Launcher, place: Place, limits: SandboxLimits) -> None:
        self._launcher, self._place, self._limits = launcher, place, limits
        self._stop = asyncio.Event()
        self._stopped = ""
        self._pids: set[int] = set()

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
        tasks = [
            asyncio.create_task(_feed(process.stdin, stdin)),
            asyncio.create_task(self._watch(process.pid)),
        ]
        ended = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait(
                (ended, stopped), timeout=self._limits.wall_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                self._end(f"it ran longer than {self._limits.wall_s:g} seconds")
        finally:
            self._kill(process)
            await asyncio.wait((ended,), timeout=_END_S)
            await asyncio.wait(readers, timeout=_END_S)
            for task in (*tasks, *readers, stopped):
                task.cancel()
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
            "AS": limits.address_space_nbytes,
            "user": self._launcher.user,
            "folder": str(folder),
        }
        if sys.platform == "darwin":
            del told["AS"]  # refused or without effect there
        return msgspec.json.encode(told).decode()

    async def _watch(self, pid: int) -> None:
        limits = self._limits
        while True:
            used = await asyncio.to_thread(process_use, pid)
            self._pids.update(used.pids)
            folders = (self._place.workspace, self._place.scratch)
            disk = [await asyncio.to_thread(folder_use, folder, limits.files) for folder in folders]
            if used.resident_nbytes > limits.memory_nbytes:
                self._end(f"it took more than {limits.memory_nbytes / 2**20:g} MiB of memory")
            elif sum(each.nbytes for each in disk) > limits.disk_nbytes:
                self._end(f"its files took more than {limits.disk_nbytes / 2**20:g} MiB")
            elif sum(each.files for each in disk) > limits.files:
                self._end(f"it made more than {limits.files} files")
            await asyncio.sleep(_LOOK_S)

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
    descriptor = os.memfd_create("seccomp", 0)
    os.write(descriptor, program)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
