"""The dashboard in a real terminal, told to end while a job runs: nothing stays, the terminal is restored."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_PATIENCE_S = 30.0
_DRIVER = """
import sys
from mlx_optiq_ext.cli.main import main
import mlx_optiq_integrations.command as command
from mlx_optiq_tui.app import LabApp

class Program:
    executable = sys.argv[1]

command.sys = Program

async def start(app):
    await app.jobs.start("Wait long", ["wait"])

LabApp.on_ready = start
sys.exit(main(["tui", "--demo"]))
"""
_JOB = """#!/bin/sh
echo $$ > '{pid}'
trap 'echo saved > "{saved}"; exit 143' TERM
for _ in $(seq 1200); do sleep 0.05; done
"""
_LEFT_ALTERNATE_SCREEN = b"\x1b[?1049l"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["SIGTERM", "SIGHUP"]
)
def test_a_signal_stops_the_jobs_and_gives_the_terminal_back(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    pid, saved, program = tmp_path / "pid", tmp_path / "saved", tmp_path / "program"
    program.write_text(_JOB.format(pid=pid, saved=saved))
    program.chmod(0o755)
    terminal, ours = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    before = termios.tcgetattr(ours)
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(program)],
        stdin=ours,
        stdout=ours,
        stderr=ours,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "XDG_DATA_HOME": str(tmp_path)},
    )
    try:
        written = _read_until(terminal, pid.is_file)
        assert process.poll() is None
        assert termios.tcgetattr(ours) != before
        process.send_signal(number)
        written += _read_until(terminal, lambda: process.poll() is not None)
    finally:
        process.kill()
    assert process.wait() == code
    assert saved.is_file()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert _LEFT_ALTERNATE_SCREEN in written
    assert b"Traceback" not in written
    assert termios.tcgetattr(ours) == before
    os.close(terminal)
    os.close(ours)


def test_a_terminal_that_is_closed_ends_the_dashboard_and_its_jobs(tmp_path: Path) -> None:
    pid, saved, program = tmp_path / "pid", tmp_path / "saved", tmp_path / "program"
    program.write_text(_JOB.format(pid=pid, saved=saved))
    program.chmod(0o755)
    terminal, ours = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, str(program)],
        preexec_fn=lambda: os.login_tty(ours),  # its controlling terminal: closing that is a hangup
        env={**os.environ, "TERM": "xterm-256color", "XDG_DATA_HOME": str(tmp_path)},
    )
    os.close(ours)
    try:
        _read_until(terminal, pid.is_file)
        os.close(terminal)
        assert process.wait(_PATIENCE_S) == 128 + signal.SIGHUP
    finally:
        process.kill()
    deadline = time.monotonic() + _PATIENCE_S
    while not saved.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_terminal_without_a_size_is_refused_in_words() -> None:
    terminal, ours = pty.openpty()
    command = [sys.executable, "-m", "mlx_optiq_ext", "tui", "--demo"]
    process = subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, start_new_session=True)
    written = _read_until(terminal, lambda: process.poll() is not None)
    assert process.returncode == 2
    assert b"stty cols 120 rows 40" in written
    os.close(terminal)
    os.close(ours)


def _read_until(terminal: int, condition: Callable[[], bool]) -> bytes:
    """What the terminal was sent until something holds."""
    deadline, written = time.monotonic() + _PATIENCE_S, b""
    while not condition() or select.select([terminal], [], [], 0)[0]:
        assert time.monotonic() < deadline, written[-2000:]
        if select.select([terminal], [], [], 0.05)[0]:
            written += os.read(terminal, 65536)
    return written
