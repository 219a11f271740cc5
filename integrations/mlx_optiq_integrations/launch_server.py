"""Start ``optiq serve`` beside a client, wait until it takes requests, stop it when the client has ended.

The server runs in a session of its own, so that Ctrl-C in the terminal reaches the client alone. Called by
``optiq run``.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import EngineError
from mlx_optiq_ext.types.progress import Progress, ProgressSink

__all__ = ["StartedServer", "free_port", "serve_command", "started_server"]

_LOOK_S = 0.1
_STOP_S = 45.0
"""Longer than a server lets running answers end."""
_SHOWN_LINES = 15


class StartedServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server of ours that takes requests."""

    url: str
    pid: int
    log: Path


class _Listening(msgspec.Struct):
    """Of what ``optiq serve --json`` prints."""

    url: str


def free_port(wanted: int) -> int:
    """A port of this machine that nobody listens on: the wanted one, if it is free."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as listener:
            return int(listener.getsockname()[1])
    raise EngineError("no port of 127.0.0.1 is free")


def serve_command(model: str, port: int, options: Sequence[str]) -> tuple[str, ...]:
    """Our own command that serves a model.

    Args:
        model: Folder or Hub repository; empty where the options name one.
        port: To listen on.
        options: Further ones of ``optiq serve``, as words.
    """
    named = ("--model", model) if model else ()
    return (sys.executable, "-m", "mlx_optiq_ext", "serve", *named, "--port", str(port), *options)


@contextlib.contextmanager
def started_server(
    command: Sequence[str], progress: ProgressSink, *, keep: bool = False
) -> Iterator[StartedServer]:
    """Run a server for the time of a ``with`` block.

    Args:
        command: From :func:`serve_command`.
        progress: Of loading.
        keep: Leave it running, with its log, once it takes requests.
    Raises:
        EngineError: It ended before it took requests; the message ends with its last lines.
    """
    descriptor, name = tempfile.mkstemp(prefix="optiq-serve-", suffix=".log")
    log, stays = Path(name), False
    with os.fdopen(descriptor, "wb") as stderr, tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen(
            [*command, "--json", "--progress-json"],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            url = _wait(process, stdout, log, progress)
            stays = keep
            yield StartedServer(url=url, pid=process.pid, log=log)
        finally:
            if not stays:
                _stop(process)
                log.unlink()


def _wait(process: subprocess.Popen[bytes], stdout: Any, log: Path, progress: ProgressSink) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        while True:
            has_ended = process.poll() is not None
            for line in lines:
                _show(line, progress)
            # Positions of a file are shared with the process that writes it: pread leaves them alone.
            said = os.pread(stdout.fileno(), 2**20, 0)
            if not has_ended:
                with contextlib.suppress(msgspec.DecodeError):
                    return msgspec.json.decode(said, type=_Listening).url
            if has_ended:
                raise EngineError(
                    f"the server ended with exit code {process.returncode}:\n{_last_words(log)}"
                )
            time.sleep(_LOOK_S)


def _show(line: str, progress: ProgressSink) -> None:
    """Pass on the progress of loading; a line that is none, or not whole yet, is left out."""
    with contextlib.suppress(msgspec.DecodeError):
        progress(msgspec.json.decode(line, type=Progress))


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if not line.startswith("{")]
    return "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let running answers end; kill what does not end in time, or on a second Ctrl-C."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
