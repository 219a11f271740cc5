"""What code in the sandbox tries and must not get: every attempt runs for real, where a sandbox works."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_optiq_ext.errors import ResourceError
from mlx_optiq_tui.chat.sandbox.place import Launcher
from mlx_optiq_tui.chat.sandbox.probe import NoSandbox, find_launcher, prove
from mlx_optiq_tui.chat.sandbox.result import SandboxLimits, SandboxResult
from mlx_optiq_tui.chat.sandbox.run import run_confined

Run = Callable[..., SandboxResult]


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    """The launcher of this machine; without one the reason is shown and nothing is tried."""
    try:
        found = find_launcher()
        asyncio.run(prove(found))
    except NoSandbox as error:
        pytest.skip(str(error))
    return found


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "workspace"


@pytest.fixture
def python(launcher: Launcher, workspace: Path) -> Run:
    """Run Python code."""

    def run(code: str, *words: str, **limits: float) -> SandboxResult:
        return asyncio.run(
            run_confined(
                launcher,
                workspace,
                ("python3", "-", *words),
                stdin=code.encode(),
                limits=SandboxLimits(**{"wall_s": 20.0, **limits}),  # type: ignore[arg-type]
            )
        )

    return run


@pytest.fixture
def shell(launcher: Launcher, workspace: Path) -> Run:
    """Run a command line."""

    def run(line: str, **limits: float) -> SandboxResult:
        bounds = SandboxLimits(**{"wall_s": 20.0, **limits})  # type: ignore[arg-type]
        return asyncio.run(run_confined(launcher, workspace, ("sh", "-c", line), limits=bounds))

    return run


def test_what_is_allowed_works(python: Run, shell: Run, workspace: Path) -> None:
    done = python("open('made.txt', 'w').write('kept'); import tempfile; tempfile.mkstemp(); print(6 * 7)")
    assert (done.exit_code, done.stdout, done.stderr, done.files) == (0, "42\n", "", ("made.txt",))
    assert (workspace / "made.txt").read_text() == "kept"
    again = shell("cat made.txt; echo problem >&2; exit 3")
    assert (again.exit_code, again.stdout, again.stderr, again.files) == (3, "kept", "problem\n", ())


def test_home_and_temporary_files_of_the_host_are_not_there(python: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    done = python(
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        print(open(path).read())\n"
        "    except OSError as error:\n"
        "        print(type(error).__name__)",
        str(tmp_path / "secret"),
        "/etc/shadow",
        "/etc/passwd",
        str(Path.home() / ".bashrc"),
    )
    assert set(done.stdout.split()) <= {"FileNotFoundError", "PermissionError"}
    assert len(done.stdout.split()) == 4
    listed = python(f"import os; print(os.listdir({str(Path.home())!r}))")
    names = set(os.listdir(Path.home()))
    assert "Error" in listed.stderr or set(eval(listed.stdout)) < names  # only the way to Python, if that


def test_nothing_is_written_outside(python: Run, tmp_path: Path) -> None:
    done = python(
        "import sys\n"
        "refused = 0\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        open(path, 'w')\n"
        "    except OSError:\n"
        "        refused += 1\n"
        "print(refused)",
        str(tmp_path / "written"),
        "/usr/written",
        "/etc/written",
        "/written",
        "/dev/written",
        "/proc/sys/kernel/hostname",
    )
    assert done.stdout == "6\n"
    assert not (tmp_path / "written").exists()


def test_a_link_out_of_the_workspace_leads_nowhere(
    python: Run, shell: Run, workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    made = python("import os, sys; os.symlink(sys.argv[1], 'link')", str(tmp_path))
    assert made.exit_code == 0
    assert made.files == ()  # a link is not a file of the workspace: nobody outside follows it
    assert (workspace / "link").is_symlink()
    done = shell("cat link/secret; echo x > link/written; ln link/secret hard")
    assert "secret" not in done.stdout
    assert not (tmp_path / "written").exists()
    assert not (workspace / "hard").exists()


def test_there_is_no_network(python: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        done = python(
            "import socket\n"
            "def attempt(call):\n"
            "    try:\n"
            "        call()\n"
            "        print('reached')\n"
            "    except OSError:\n"
            "        print('refused')\n"
            f"attempt(lambda: socket.create_connection(('127.0.0.1', {port}), 2))\n"
            "attempt(lambda: socket.create_connection(('1.1.1.1', 80), 2))\n"
            "attempt(lambda: socket.getaddrinfo('example.com', 80))\n"
            "attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53)))\n"
        )
        assert done.stdout.split() == ["refused"] * 4
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_unix_sockets_of_the_host_are_not_reached(python: Run, tmp_path: Path) -> None:
    path, abstract = str(tmp_path / "socket"), "\0optiq-test-socket"
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as by_name:
        by_path.bind(path)
        by_name.bind(abstract)
        by_path.listen()
        by_name.listen()
        done = python(
            "import socket\n"
            f"for name in ({path!r}, {abstract!r}):\n"
            "    try:\n"
            "        socket.socket(socket.AF_UNIX).connect(name)\n"
            "        print('reached')\n"
            "    except OSError:\n"
            "        print('refused')\n"
        )
    assert done.stdout.split() == ["refused", "refused"]


def test_a_fork_bomb_runs_into_its_limit(python: Run) -> None:
    done = python(
        "import os, time\n"
        "made = 0\n"
        "while True:\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(60)\n"
        "        made += 1\n"
        "    except OSError:\n"
        "        break\n"
        "print(made)\n",
        processes=20,
    )
    assert 10 <= int(done.stdout) <= 20
    bomb = python(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", processes=20, wall_s=1.5
    )
    assert "longer than 1.5 seconds" in bomb.stopped
    assert bomb.seconds < 10


def test_output_is_cut_and_endless_output_stopped(shell: Run) -> None:
    cut = shell("head -c 100000 /dev/zero | tr '\\0' x", output_nbytes=1000)
    assert (cut.stdout, cut.stdout_dropped, cut.stopped) == ("x" * 1000, 99_000, "")
    endless = shell("yes", output_nbytes=1000, dropped_nbytes=2**20)
    assert "of output" in endless.stopped
    assert len(endless.stdout) == 1000
    assert endless.seconds < 10


def test_files_cannot_grow_beyond_their_limit(python: Run, workspace: Path) -> None:
    done = python("open('big', 'wb').write(bytes(2 * 2**20))", file_nbytes=2**20)
    assert "File too large" in done.stderr or done.exit_code != 0
    assert (workspace / "big").stat().st_size <= 2**20
    many = python(
        "import itertools, time\n"
        "for number in itertools.count():\n"
        "    open(f'part{number}', 'wb').write(bytes(2**20)); time.sleep(0.005)\n",
        disk_nbytes=8 * 2**20,
    )
    assert "its files took more than 8 MiB" in many.stopped
    empty = python(
        "import itertools\nfor number in itertools.count():\n    open(f'none{number}', 'w').close()\n",
        files=300,
    )
    assert "more than 300 files" in empty.stopped


def test_files_hide_from_no_limit(launcher: Launcher, tmp_path: Path) -> None:
    """Removed but open, in a closed folder, deeper than a path reaches: each is counted or stopped."""
    fill = "\nimport time; time.sleep(2)\n"
    ways = {
        "removed": "held = []\n"
        "for _ in range(8):\n"
        "    held.append(open('one', 'wb', 0)); held[-1].write(bytes(2**21)); os.unlink('one')",
        "closed": "os.mkdir('shut')\n"
        "for number in range(8):\n"
        "    os.chmod('shut', 0o700); open(f'shut/{number}', 'wb', 0).write(bytes(2**21))\n"
        "    os.chmod('shut', 0)",
        "deep": "for _ in range(30):\n"
        "    os.mkdir('d' * 250); os.chdir('d' * 250)\n"
        "for number in range(8): open(str(number), 'wb', 0).write(bytes(2**21))",
    }
    limits = SandboxLimits(wall_s=20.0, disk_nbytes=2**22)

    async def tried(name: str) -> SandboxResult:
        code = f"import ctypes, os\nctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n{ways[name]}{fill}"
        words = ("python3", "-")
        return await run_confined(launcher, tmp_path / name / "in", words, stdin=code.encode(), limits=limits)

    async def all_of_them() -> list[SandboxResult]:
        return await asyncio.gather(*map(tried, ways))

    names = list(ways) if sys.platform == "linux" else ["closed", "deep"]
    for name, done in zip(ways, asyncio.run(all_of_them()), strict=True):
        assert name not in names or "its files" in done.stopped or "cannot be counted" in done.stopped, name


def test_what_was_left_can_be_cleared_up(shell: Run, workspace: Path) -> None:
    made = shell("mkdir shut; for n in 1 2 3; do head -c 1000000 /dev/zero > shut/$n; done; chmod 0 shut")
    assert made.stopped == "" or "cannot be counted" in made.stopped
    done = shell("sleep 0.3; rm -r shut; ls", disk_nbytes=2**20, files=2)
    assert (done.stopped, done.exit_code, done.stdout) == ("", 0, "")
    assert list(workspace.iterdir()) == []


def test_a_nearly_full_disk_is_left_alone(shell: Run) -> None:
    assert "the disk has less than" in shell("sleep 10", spare_nbytes=2**60).stopped


def test_names_and_words_that_are_no_text_are_survived(python: Run, shell: Run) -> None:
    made = python(
        "open(b'\\xff\\x1b]0;t\\x07', 'w').close(); import sys; sys.stdout.buffer.write(b'\\xff\\x00')"
    )
    assert made.files == ("\\xff\x1b]0;t\x07",)
    assert made.stdout == "\\xff\0"
    with pytest.raises(ResourceError, match="null"):
        shell("echo \0")


@pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
def test_memory_and_sockets_that_nothing_confines_are_refused(python: Run) -> None:
    done = python(
        "import ctypes, os, socket\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def has(family):\n"
        "    try:\n"
        "        return bool(socket.socket(family, socket.SOCK_STREAM))\n"
        "    except OSError:\n"
        "        return False\n"
        "print([family for family in range(46) if has(family)])\n"
        "print(libc.memfd_create(b'x', 0), libc.shmget(0, 4096, 0o600), libc.semget(0, 1, 0o600))\n"
    )
    families, memory = done.stdout.splitlines()
    assert set(eval(families)) <= {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}
    assert memory == "-1 -1 -1"


@pytest.mark.skipif(sys.platform != "linux", reason="a scratch folder lies beside the workspace on Linux")
def test_a_dashboard_that_is_killed_leaves_nothing(shell: Run, workspace: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from mlx_optiq_tui.chat.sandbox import probe, run\n"
        "asyncio.run(run.run_confined(probe.find_launcher(), Path(sys.argv[1]),"
        " ('sh', '-c', 'echo > begun; sleep 62.5')))\n"
    )
    dashboard = subprocess.Popen([sys.executable, "-c", code, str(workspace)])
    while not (workspace / "begun").exists():
        time.sleep(0.02)
    dashboard.kill()
    dashboard.wait()
    until = time.monotonic() + 5
    while (listed := subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True).stdout) and (
        "sleep 62.5" in listed and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert "sleep 62.5" not in listed
    assert len(list(workspace.parent.glob("optiq-sandbox-*"))) == 1
    shell("true")
    assert list(workspace.parent.glob("optiq-sandbox-*")) == []


def test_memory_is_limited_alone_and_together(python: Run) -> None:
    if sys.platform == "linux":
        alone = python("bytearray(2**30)", address_space_nbytes=2**29)
        assert "MemoryError" in alone.stderr
    together = python(
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        held = bytearray(os.urandom(2**20)) * 60\n"
        "        time.sleep(60)\n"
        "time.sleep(60)\n",
        memory_nbytes=128 * 2**20,
    )
    assert "more than 128 MiB of memory" in together.stopped


def test_processor_time_is_limited(python: Run) -> None:
    done = python("while True: pass", cpu_s=1)
    assert done.exit_code != 0
    assert 0.5 < done.seconds < 15


def test_processes_of_the_host_are_neither_seen_nor_killed(python: Run) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        done = python(
            "import os, signal, sys\n"
            "for pid in (int(sys.argv[1]), int(sys.argv[2]), -1, os.getppid()):\n"
            "    try:\n"
            "        os.kill(pid, signal.SIGKILL)\n"
            "        print('killed')\n"
            "    except OSError:\n"
            "        print('refused')\n"
            "print(os.path.exists(f'/proc/{sys.argv[1]}/environ'))\n",
            str(victim.pid),
            str(os.getpid()),
        )
        assert done.stdout.split()[:2] == ["refused", "refused"]
        assert done.stdout.split()[-1] == "False"
        assert done.seconds < 10
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
def test_system_calls_that_break_walls_are_refused(python: Run) -> None:
    done = python(
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "calls = {\n"
        "    'ptrace': lambda: libc.ptrace(16, os.getppid(), 0, 0),\n"
        "    'unshare': lambda: libc.unshare(0x10000000),\n"
        "    'mount': lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None),\n"
        "    'setns': lambda: libc.setns(0, 0),\n"
        "    'chroot': lambda: libc.chroot(b'/tmp'),\n"
        "    'keyctl': lambda: libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 0),\n"
        "    'setuid': lambda: libc.setuid(0) or -(os.getuid() != 0),\n"
        "}\n"
        "print(*(name for name, call in calls.items() if call() != -1))\n"
    )
    assert (done.exit_code, done.stdout, done.stderr) == (0, "\n", "")


def test_nothing_runs_on_afterwards(shell: Run, launcher: Launcher) -> None:
    mark = f"61.{os.getpid()}"
    begun = time.monotonic()
    shell(f"(setsid sleep {mark} >/dev/null 2>&1 &) ; sleep 0.3")
    assert time.monotonic() - begun < 10
    listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert f"sleep {mark}" not in listed


def test_the_environment_tells_nothing(shell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    done = shell("env; cat /proc/*/environ 2>/dev/null")
    assert "a-secret-of-mine" not in done.stdout
    assert "HOME=/workspace" in done.stdout or sys.platform == "darwin"


def test_standard_input_is_not_the_terminal(python: Run) -> None:
    done = python(
        "import os\n"
        "try:\n"
        "    os.open('/dev/tty', os.O_RDWR)\n"
        "    print('reached')\n"
        "except OSError:\n"
        "    print('refused')\n"
    )
    assert done.stdout == "refused\n"


def test_leaving_ends_the_program(launcher: Launcher, workspace: Path) -> None:
    async def leave() -> None:
        run = run_confined(launcher, workspace, ("sh", "-c", "echo $$ > begun; sleep 50; echo > ended"))
        task = asyncio.create_task(run)
        while not (workspace / "begun").exists():
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - begun < 15
    assert not (workspace / "ended").exists()
