"""Prove that a sandbox holds on this machine before anything else runs in it.

Nothing is believed because a program is installed: a script is run that tries what is forbidden — read and
write outside, read the environment, connect to a port of this machine — and what is allowed. Only when every
attempt ends as it must is there a sandbox.
"""

import asyncio
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import ResourceError
from mlx_optiq_tui.chat.sandbox.bubblewrap import Bubblewrap
from mlx_optiq_tui.chat.sandbox.place import Launcher
from mlx_optiq_tui.chat.sandbox.result import SandboxLimits, SandboxResult
from mlx_optiq_tui.chat.sandbox.run import run_confined
from mlx_optiq_tui.chat.sandbox.seatbelt import SANDBOX_EXEC, Seatbelt

__all__ = ["NoSandbox", "Sandbox", "find_launcher", "open_sandbox", "prove"]

_LIMITS = SandboxLimits(wall_s=20.0, cpu_s=10)

_ATTEMPTS = """
import json, os, socket, sys
outside, port, secret = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def can(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
print(json.dumps({
    "write the workspace": can(lambda: open("probe", "w").close()),
    "read outside": can(lambda: open(outside + "/canary").close()),
    "list outside": can(lambda: os.listdir(outside)),
    "write outside": can(lambda: open(outside + "/written", "w").close()),
    "reach a port of this machine": can(lambda: socket.create_connection(("127.0.0.1", port), 2)),
    "see the environment": secret in os.environ,
    "start a program": os.system("true") == 0,
}))
"""
_ALLOWED = frozenset({"write the workspace", "start a program"})


class NoSandbox(ResourceError):
    """No sandbox works here; the message says why and what to install."""


class Sandbox:
    """A sandbox that was seen to hold.

    Args:
        launcher: How programs are started.
        workspace: The only folder that they reach; kept.
    """

    def __init__(self, launcher: Launcher, workspace: Path) -> None:
        self.launcher = launcher
        self.workspace = workspace

    async def run(
        self, words: Sequence[str], *, stdin: bytes = b"", limits: SandboxLimits | None = None
    ) -> SandboxResult:
        """Run a program; see :func:`.run_confined`."""
        return await run_confined(self.launcher, self.workspace, words, stdin=stdin, limits=limits)


async def open_sandbox(workspace: Path, find: Callable[[], Launcher] | None = None) -> Sandbox:
    """A sandbox for ``workspace``, proven now.

    Raises:
        NoSandbox: None is installed, or it does not hold.
    """
    launcher = (find or find_launcher)()
    await prove(launcher)
    return Sandbox(launcher, workspace)


def find_launcher() -> Launcher:
    """The launcher for this system.

    Raises:
        NoSandbox: It is not installed, or none is known for this system.
    """
    if sys.platform == "darwin":
        if not os.access(SANDBOX_EXEC, os.X_OK):
            raise NoSandbox(f"there is no {SANDBOX_EXEC}; it is a part of macOS")
        return Seatbelt()
    if sys.platform == "linux":
        found = shutil.which("bwrap")
        if found is None:
            raise NoSandbox(
                "bubblewrap is not installed; install it (`apt install bubblewrap`, `dnf install "
                "bubblewrap`, `pacman -S bubblewrap`) and try again"
            )
        return Bubblewrap(executable=found)
    raise NoSandbox(f"there is no sandbox for {sys.platform}; use macOS or Linux")


async def prove(launcher: Launcher) -> None:
    """Try what must fail and what must not.

    Raises:
        NoSandbox: Something ended otherwise; says what.
    """
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="optiq-probe-")).resolve()
    outside = folder / "outside"
    outside.mkdir()
    (outside / "canary").write_text("outside")
    secret = f"OPTIQ_PROBE_{secrets.token_hex(4)}"
    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: _note(connections, writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    os.environ[secret] = "1"
    try:
        words = ("python3", "-c", _ATTEMPTS, str(outside), str(port), secret)
        result = await run_confined(launcher, folder / "workspace", words, limits=_LIMITS)
        written = (outside / "written").exists()
    finally:
        del os.environ[secret]
        server.close()
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    _judge(launcher.name, result, written or bool(connections))


async def _note(connections: list[asyncio.StreamWriter], writer: asyncio.StreamWriter) -> None:
    connections.append(writer)
    writer.close()


def _judge(name: str, result: SandboxResult, seen_outside: bool) -> None:
    outcomes: dict[str, bool] = {}
    with suppress(msgspec.MsgspecError):
        outcomes = msgspec.json.decode(result.stdout, type=dict[str, bool])
    if not outcomes:
        why = (result.stopped or result.stderr.strip() or f"exit code {result.exit_code}").splitlines()[-1]
        raise NoSandbox(f"{name} does not start programs here: {why}{_advice(why)}")
    wrong = [what for what, done in outcomes.items() if done != (what in _ALLOWED)]
    if wrong or seen_outside:
        could = [f"can {what}" if outcomes[what] else f"cannot {what}" for what in wrong]
        raise NoSandbox(f"{name} does not hold here: a program in it {', '.join(could) or 'got out'}")


def _advice(why: str) -> str:
    if "namespace" in why or "uid map" in why or "Operation not permitted" in why:
        return (
            "; unprivileged user namespaces are switched off here. On Ubuntu from 24.04 an AppArmor profile "
            "for bwrap allows them; inside a container they need its runtime's permission"
        )
    return ""
