"""Run a client in the foreground with a configuration for this session only.

Knows programs, files and signals, and no client. Called by ``optiq run``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from mlx_optiq_ext.errors import UsageError

__all__ = ["find_program", "run_program", "write_files"]

_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_TO_PASS_ON = (signal.SIGTERM, signal.SIGHUP)


def find_program(name: str, install: str) -> str:
    """The path of a client's program.

    Args:
        name: As on the PATH.
        install: The command that would install it.
    Raises:
        UsageError: It is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is not installed; install it with `{install}`")
    return found


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write a session's files, readable by this user alone.

    Args:
        folder: They lie below it.
        files: Text by relative path.
    """
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)


def run_program(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program on this terminal until it ends.

    Ctrl-C is the program's: the terminal sends it there too, and where there is none we pass it on. SIGTERM
    and SIGHUP are always passed on.

    Args:
        argv: The program and its arguments.
        env: Its whole environment.
    Returns:
        Its exit code; 128 and the number of the signal that ended it.
    """
    with _deferred_signals() as pending:
        process = subprocess.Popen(list(argv), env=dict(env))
        with _signals_for(process):
            for signum in pending:
                process.send_signal(signum)
            code = process.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Note signals that come before there is somebody to pass them on to."""
    pending: list[int] = []
    with _handled(lambda signum, _frame: pending.append(signum)):
        yield pending


@contextlib.contextmanager
def _signals_for(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(signum: int, _frame: FrameType | None) -> None:
        if signum in _TO_PASS_ON or not _has_terminal():
            process.send_signal(signum)

    with _handled(pass_on):
        yield


@contextlib.contextmanager
def _handled(handler: "signal._HANDLER") -> Iterator[None]:
    signums = (*_FROM_TERMINAL, *_TO_PASS_ON)
    before = {signum: signal.signal(signum, handler) for signum in signums}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _has_terminal() -> bool:
    """Whether keys of a terminal send their signals to our process group."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
