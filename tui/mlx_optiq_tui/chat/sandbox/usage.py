"""What a running program and its folders take now: processes, resident bytes, files, bytes on disk.

Reads /proc where there is one, else asks ``ps``; links are never followed. Called by ``sandbox.run`` a few
times a second.
"""

import os
import stat
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

__all__ = ["FolderUse", "ProcessUse", "folder_files", "folder_use", "process_use"]

_PROC = Path("/proc")


class ProcessUse(msgspec.Struct, frozen=True, kw_only=True):
    """A process and its descendants."""

    pids: tuple[int, ...]
    resident_nbytes: int


class FolderUse(msgspec.Struct, frozen=True, kw_only=True):
    """A folder and all below."""

    files: int
    nbytes: int


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


def folder_use(folder: Path, most: int) -> FolderUse:
    """Files and bytes below a folder; counting ends when more than ``most`` files were seen."""
    files, nbytes = 0, 0
    for _, told in _entries(folder):
        files += 1
        nbytes += told.st_blocks * 512
        if files > most:
            break
    return FolderUse(files=files, nbytes=nbytes)


def folder_files(folder: Path, most: int) -> dict[str, tuple[int, int]]:
    """Time of change (ns) and bytes of the regular files below a folder, by relative path."""
    found: dict[str, tuple[int, int]] = {}
    for path, told in _entries(folder):
        if stat.S_ISREG(told.st_mode):
            found[os.path.relpath(path, folder)] = (told.st_mtime_ns, told.st_size)
        if len(found) > most:
            break
    return found


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    try:
                        told = entry.stat(follow_symlinks=False)
                    except OSError:  # removed meanwhile
                        continue
                    yield entry.path, told
                    if stat.S_ISDIR(told.st_mode):
                        waiting.append(entry.path)
        except OSError:  # removed, or closed to us
            continue
