"""Where a program in the sandbox runs and with which Python: what both launchers have in common.

Knows no launcher. The interpreter is what the virtual environment of this process was made from, with
the packages of that environment.
"""

import sys
import sysconfig
from pathlib import Path
from typing import Protocol

import msgspec

__all__ = ["Enclosed", "Launcher", "Place", "python_executable", "python_folders", "sandbox_environment"]

_SYSTEM = ("/usr", "/System")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Folders of one run, outside."""

    workspace: Path
    """Kept; what the program makes is found here."""
    scratch: Path
    """Its /tmp; removed when it has ended."""


class Enclosed(msgspec.Struct, frozen=True, kw_only=True):
    """A program's surroundings, ready to start it in."""

    words: tuple[str, ...]
    """The command that the program's own words are appended to."""
    workspace: Path
    """As the program sees it."""
    scratch: Path
    """As the program sees it."""


class Launcher(Protocol):
    """A way to start a program that can reach only a :class:`Place`."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def user(self) -> int | None:
        """Whom the program becomes inside, where the launcher cannot say it itself."""
        ...

    def enclose(self, place: Place, filter_descriptor: int | None) -> Enclosed:
        """How to start a program there; the open file holds a system call filter, where there is one."""
        ...


def python_executable() -> Path:
    """The interpreter behind this process's, without its virtual environment."""
    return Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


def python_folders() -> list[Path]:
    """Folders that Python needs besides those of the system: its own, and that of installed packages.

    A folder that holds the user's home is left out.
    """
    home = Path.home().resolve()
    wanted = [Path(sys.base_prefix).resolve(), Path(sysconfig.get_path("purelib")).resolve()]
    return [
        folder
        for folder in wanted
        if not home.is_relative_to(folder) and not any(folder.is_relative_to(each) for each in _SYSTEM)
    ]


def sandbox_environment(workspace: Path, scratch: Path) -> dict[str, str]:
    """All environment variables that a program gets."""
    folders = [str(python_executable().parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    return {
        "PATH": ":".join(dict.fromkeys(folders)),
        "HOME": str(workspace),
        "TMPDIR": str(scratch),
        "USER": "sandbox",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(Path(sysconfig.get_path("purelib")).resolve()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OPENBLAS_NUM_THREADS": "4",
        "OMP_NUM_THREADS": "4",
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": str(scratch),
    }
