"""What a running program and its folders take now: processes, resident bytes, files, bytes on disk.

Reads /proc where there is one, else asks ``ps``; links are never followed. Called by ``sandbox.run`` a few
times a second.
"""

import os
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

__all__ = [
    "FolderUse",
    "ProcessUse",
    "folder_files",
    "folder_use",
    "open_folders",
    "process_use",
    "remove_folder",
    "removed_nbytes",
]

_PROC = Path("/proc")


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """A process and its descendants."""

    pids: tuple[int, ...]
    resident_nbytes: int


class FolderUse(msgspec.Struct, frozen=True, kw_only=True):
    """A folder and all below."""

    files: int = 0
    nbytes: int = 0
    uncountable: str = ""
    """Why something below cannot be counted: a folder is closed, or lies too deep for a path."""


def process_use(root: int) -> ProcessUse:
    """A process, its descendants, and the memory they hold."""
    table = _proc_table() if (_PROC / "self" / "statm").exists() else _ps_table()
    children = defaultdict[int, list[int]](list)
    for pid, (parent, _) in table.items():
        children[parent].append(pid)
    found, waiting = list[int](), [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children[pid]
    return ProcessUse(pids=tuple(found), resident_nbytes=sum(table[pid][1] for pid in found if pid in table))


def _proc_table() -> dict[int, tuple[int, int]]:
    """Parent and resident bytes by process."""
    page = os.sysconf("SC_PAGE_SIZE")
    table = {}
    for name in os.listdir(_PROC):
        if name.isdigit():
            try:
                # After the name, which may hold anything: state, parent, …
                told = (_PROC / name / "stat").read_bytes().rpartition(b")")[2].split()
                table[int(name)] = (int(told[1]), int(told[21]) * page)
            except (OSError, IndexError, ValueError):  # it ended meanwhile
                continue
    return table


def _ps_table() -> dict[int, tuple[int, int]]:
    told = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split() for line in told.splitlines())
    return {int(pid): (int(parent), int(kilobytes) * 1024) for pid, parent, kilobytes in rows}


def removed_nbytes(pids: Iterable[int]) -> int:
    """Bytes of files that are in no folder any more and held open by these processes; 0 without /proc."""
    found: dict[tuple[int, int], int] = {}
    for pid in pids:
        with suppress(OSError), os.scandir(_PROC / str(pid) / "fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    told = entry.stat()
                    if stat.S_ISREG(told.st_mode) and not told.st_nlink:
                        found[told.st_dev, told.st_ino] = told.st_blocks * 512
    return sum(found.values())


def folder_use(folder: Path, most: int) -> FolderUse:
    """Files and bytes below a folder; counting ends when more than ``most`` files were seen."""
    files, nbytes = 0, 0
    try:
        for _, told in _entries(folder):
            files += 1
            nbytes += told.st_blocks * 512
            if files > most:
                break
    except OSError as error:
        return FolderUse(files=files, nbytes=nbytes, uncountable=error.strerror or str(error))
    return FolderUse(files=files, nbytes=nbytes)


def folder_files(folder: Path, most: int) -> dict[str, tuple[int, int]]:
    """Time of change (ns) and bytes of the regular files below a folder, by relative path.

    Bytes of names that are no UTF-8 are shown as such; from what cannot be read on, nothing is listed.
    """
    found: dict[str, tuple[int, int]] = {}
    with suppress(OSError):
        for path, told in _entries(folder):
            if stat.S_ISREG(told.st_mode):
                name = os.fsencode(os.path.relpath(path, folder)).decode("utf-8", "backslashreplace")
                found[name] = (told.st_mtime_ns, told.st_size)
            if len(found) > most:
                break
    return found


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below.

    Raises:
        OSError: A folder cannot be read, so anything may lie there.
    """
    waiting = [str(folder)]
    while waiting:
        # What is removed or replaced meanwhile is gone.
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    told = entry.stat(follow_symlinks=False)
                    yield entry.path, told
                    if stat.S_ISDIR(told.st_mode):
                        waiting.append(entry.path)


def open_folders(folder: Path) -> None:
    """Let the owner into all folders below, so that they can be counted; only where no program runs there.

    Raises:
        OSError: They are not the owner's.
    """
    for parent, names, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            mode = os.lstat(path).st_mode
            if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
                os.chmod(path, stat.S_IMODE(mode) | 0o700)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all below, closed folders too; only where no program runs there.

    Raises:
        OSError: Something cannot be removed.
    """
    open_folders(folder)
    shutil.rmtree(folder)
