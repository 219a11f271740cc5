"""Linux: the command that starts a program with bubblewrap.

The program gets namespaces of its own for everything, so no network, no host processes, no host sockets; the
system's folders read-only, a workspace and a private /tmp to write in, and no home.

Source: bwrap(1).
"""

import os
from pathlib import Path

import msgspec

from mlx_optiq_tui.chat.sandbox.place import Enclosed, Place, python_folders

__all__ = ["Bubblewrap"]

_WORKSPACE, _SCRATCH = Path("/workspace"), Path("/tmp")
_NOBODY = 65534
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
_SETTINGS = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/mime.types",
)


class Bubblewrap(msgspec.Struct, frozen=True, kw_only=True):
    """Starts programs by ``bwrap``.

    Root needs no user namespace, and one would make the program root of the files outside: there it becomes
    ``nobody`` instead.
    """

    executable: str
    is_root: bool = msgspec.field(default_factory=lambda: os.geteuid() == 0)
    name: str = "bubblewrap"

    @property
    def user(self) -> int | None:
        """``nobody`` for root."""
        return _NOBODY if self.is_root else None

    def enclose(self, place: Place, filter_descriptor: int | None) -> Enclosed:
        """How to start a program."""
        words = [self.executable, *self._namespaces(), "--die-with-parent", "--new-session"]
        words += ["--hostname", "sandbox"]
        words += [*_open_folder("/etc"), *_open_folder("/nix")]
        for path in _SYSTEM:
            words += _as_it_is(Path(path))
        for path in _SETTINGS:
            words += ["--ro-bind-try", path, path]
        words += ["--proc", "/proc", "--dev", "/dev"]
        words += ["--bind", str(place.scratch), str(_SCRATCH), "--bind", str(place.scratch), "/dev/shm"]
        for folder in python_folders():
            for parent in reversed(folder.parents[:-1]):
                words += _open_folder(str(parent))
            words += ["--ro-bind", str(folder), str(folder)]
        words += ["--bind", str(place.workspace), str(_WORKSPACE)]
        # What is left of bubblewrap's own file systems lies in memory, which nothing would count.
        words += ["--remount-ro", "/dev", "--remount-ro", "/"]
        if filter_descriptor is not None:
            words += ["--seccomp", str(filter_descriptor)]
        return Enclosed(words=(*words, "--"), workspace=_WORKSPACE, scratch=_SCRATCH)

    def _namespaces(self) -> list[str]:
        if not self.is_root:
            return ["--unshare-all", "--cap-drop", "ALL"]
        names = ("ipc", "pid", "net", "uts", "cgroup-try")
        words = [f"--unshare-{name}" for name in names]
        # To become nobody, and gone with that.
        return [*words, "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]


def _open_folder(path: str) -> list[str]:
    """Folders that bubblewrap makes on the way to others could be closed to ``nobody``."""
    return ["--perms", "0755", "--dir", path]


def _as_it_is(path: Path) -> list[str]:
    """A folder of the system, or the link that stands in its place."""
    if path.is_symlink():
        return ["--symlink", os.readlink(path), str(path)]
    return ["--ro-bind", str(path), str(path)] if path.exists() else []
