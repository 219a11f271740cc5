"""A program in the foreground with a server beside it: signals, exit codes, what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mlx_optiq_ext.errors import EngineError, UsageError
from mlx_optiq_ext.types.progress import Progress, ignore_progress
from mlx_optiq_integrations.launch import find_program, run_program, write_files
from mlx_optiq_integrations.launch_server import free_port, serve_command, started_server

_PATIENCE_S = 20.0
READY = """
    import sys, time, json
    step = {"stage": "load tiny", "done": 1, "total": 2, "seconds": 0.1}
    print(json.dumps(step), file=sys.stderr, flush=True)
    print("12:00:00 INFO loaded", file=sys.stderr, flush=True)
    print(json.dumps({"url": "http://127.0.0.1:1", "models": []}, indent=2), flush=True)
    time.sleep(60)
"""


def _program(tmp_path: Path, code: str) -> tuple[str, ...]:
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(code))
    return (sys.executable, str(file))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_exit_code_is_the_programs(tmp_path: Path) -> None:
    assert run_program(_program(tmp_path, "raise SystemExit(7)"), os.environ) == 7


def test_a_program_ended_by_a_signal_shows_it_as_a_shell_does(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_program(_program(tmp_path, code), os.environ) == 137


def test_the_environment_is_the_given_one(tmp_path: Path) -> None:
    code = f"import os, json; json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))"
    run_program(_program(tmp_path, code), {"ONLY": "this"})
    seen = json.loads((tmp_path / "env").read_text())
    assert seen["ONLY"] == "this"
    assert "HOME" not in seen


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 42), (signal.SIGTERM, 43), (signal.SIGHUP, 44)])
def test_a_signal_reaches_the_program_and_we_wait_for_its_end(
    signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    program = _program(
        tmp_path,
        """
        import signal, sys, time
        for number, code in ((signal.SIGINT, 42), (signal.SIGTERM, 43), (signal.SIGHUP, 44)):
            signal.signal(number, lambda *_, code=code: (time.sleep(0.2), sys.exit(code)))
        print("up", flush=True)
        time.sleep(60)
        """,
    )
    caller = f"""
        import os, sys
        from mlx_optiq_integrations.launch import run_program
        sys.exit(run_program({program!r}, os.environ))
    """
    (tmp_path / "caller").mkdir()
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # A session of its own has no terminal, as in CI: then Ctrl-C is passed on by us.
    with subprocess.Popen(
        _program(tmp_path / "caller", caller), stdout=subprocess.PIPE, env=paths, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signum)
        assert process.wait(_PATIENCE_S) == code


def test_ctrl_c_of_a_terminal_reaches_the_program_once(tmp_path: Path) -> None:
    program = _program(
        tmp_path,
        f"""
        import signal, sys, time
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        print("up", flush=True)
        deadline = time.monotonic() + {_PATIENCE_S}
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        sys.exit(40 + len(seen))
        """,
    )
    # The session's leader takes the terminal as its own, as a shell's would be.
    caller = f"""
        import fcntl, os, sys, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        from mlx_optiq_integrations.launch import run_program
        sys.exit(run_program({program!r}, os.environ))
    """
    (tmp_path / "caller").mkdir()
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    keyboard, terminal = os.openpty()
    with subprocess.Popen(
        _program(tmp_path / "caller", caller),
        stdin=terminal,
        stdout=subprocess.PIPE,
        env=paths,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        os.write(keyboard, b"\x03")
        assert process.wait(_PATIENCE_S) == 41
    os.close(keyboard)
    os.close(terminal)


def test_a_missing_program_says_how_to_install_it() -> None:
    with pytest.raises(
        UsageError, match="no-such-agent is not installed; install it with `npm i no-such-agent`"
    ):
        find_program("no-such-agent", "npm i no-such-agent")


def test_files_of_a_session_are_the_users_alone(tmp_path: Path) -> None:
    write_files(tmp_path, {"deep/settings.json": "{}"})
    assert (tmp_path / "deep" / "settings.json").read_text() == "{}"
    assert (tmp_path / "deep" / "settings.json").stat().st_mode & 0o777 == 0o600


def test_a_port_that_is_taken_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) not in (0, port)
    assert free_port(port) == port


def test_options_of_the_server_follow_model_and_port() -> None:
    words = serve_command("org/model", 81, ["--context", "4096"])
    assert words[1:] == (
        "-m", "mlx_optiq_ext", "serve", "--model", "org/model", "--port", "81", "--context", "4096",
    )  # fmt: skip
    assert "--model" not in serve_command("", 81, ["--demo-model"])


def test_a_server_lives_as_long_as_the_block(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with started_server(_program(tmp_path, READY), seen.append) as server:
        assert server.url == "http://127.0.0.1:1"
        assert _is_alive(server.pid)
        assert "INFO loaded" in server.log.read_text()
    assert [(event.stage, event.done, event.total) for event in seen] == [("load tiny", 1, 2)]
    assert not _is_alive(server.pid)
    assert not server.log.exists()


def test_a_server_that_is_kept_stays_with_its_log(tmp_path: Path) -> None:
    with started_server(_program(tmp_path, READY), ignore_progress, keep=True) as server:
        pass
    assert _is_alive(server.pid)
    assert server.log.exists()
    os.kill(server.pid, signal.SIGKILL)
    server.log.unlink()


def test_a_server_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    code = """
        import sys
        print('{"stage": "load", "done": 0, "total": 2}', file=sys.stderr)
        print("optiq: /nowhere is no folder", file=sys.stderr)
        print('{"error": {"message": "x"}}')
        sys.exit(3)
    """
    with (
        pytest.raises(EngineError, match=r"ended with exit code 3:\n  optiq: /nowhere is no folder$"),
        started_server(_program(tmp_path, code), ignore_progress),
    ):
        pytest.fail("it never listens")


def test_an_error_inside_the_block_stops_the_server(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        started_server(_program(tmp_path, READY), ignore_progress) as server,
    ):
        raise KeyboardInterrupt
    deadline = time.monotonic() + _PATIENCE_S
    while _is_alive(server.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_alive(server.pid)
