"""Write files and folders so that a reader sees all of them or nothing.

Knows nothing of their content. Everything this package stores goes through here: a file is written beside
its final name and renamed; a folder grows under a hidden sibling name and is renamed when it is complete.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import OutputExists, ResourceError, UsageError, VerificationError

__all__ = [
    "atomic_folder",
    "check_disk_space",
    "find_stale_folders",
    "incomplete_path",
    "require_absent",
    "require_absent_file",
    "require_writable",
    "unwritable",
    "write_bytes_atomic",
    "write_json_atomic",
]

_MARKER = "INCOMPLETE.txt"


def write_bytes_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write ``data`` to ``path``, replacing it in one step.

    Args:
        path: Final name; its folder is made where it is missing.
        data: The whole content.
        mode: Permissions of the file; None: what the process gives new files.
    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritable(path: Path | str, error: OSError) -> ResourceError:
    """The error to raise where a file system refuses to take ``path``."""
    reason = error.strerror or error
    return ResourceError(f"cannot write {path}: {reason}; free some space there, or choose another output")


def write_json_atomic(path: Path, value: object) -> None:
    """Write ``value`` (plain data or msgspec Structs) to ``path`` as indented JSON, in one step.

    Raises:
        ResourceError: See :func:`write_bytes_atomic`.
    """
    write_bytes_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def require_absent(out: Path) -> None:
    """Refuse an output name that is taken; call it before any long work.

    Raises:
        OutputExists: Something is there, be it an empty folder.
        UsageError: Nothing can be written there.
    """
    _refuse_taken(out)
    require_writable(out)


def _refuse_taken(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise OutputExists(f"output {out} already exists; remove it or choose another with -o")


def require_absent_file(out: Path, *, force: bool = False) -> None:
    """Refuse to replace a file that nobody said may be replaced; call it before any long work.

    Args:
        out: File that will be written.
        force: The user allows it to be replaced.
    Raises:
        OutputExists: Something is there; a folder also with ``force``.
        UsageError: Nothing can be written there.
    """
    require_writable(out)
    if out.is_dir():
        raise OutputExists(f"output {out} is a folder; give a file name with -o")
    if not force and (out.exists() or out.is_symlink()):
        raise OutputExists(
            f"output {out} already exists; add --force to replace it, or choose another with -o"
        )


def require_writable(out: Path) -> None:
    """Refuse an output that could not be written, by writing where it, or its first new folder, will be.

    Args:
        out: File or folder that will be made, along with missing folders above it.
    Raises:
        UsageError: Says which folder does not take it.
    """
    folder = _nearest_existing(out.absolute().parent)
    try:
        probe = tempfile.mkdtemp(prefix=".optiq-", dir=folder)
        os.rmdir(probe)
    except OSError as error:
        reason = error.strerror if folder.is_dir() else "not a folder"
        raise UsageError(
            f"cannot write {out}: {folder} takes no new files ({reason}); choose another output"
        ) from error


def check_disk_space(folder: Path, needed_nbytes: int) -> int:
    """Make sure that ``needed_nbytes`` fit on the disk of ``folder``, which need not exist yet.

    Returns:
        Free bytes.
    Raises:
        ResourceError: They do not fit; names what is needed and what is free.
    """
    free = shutil.disk_usage(_nearest_existing(folder.absolute())).free
    if needed_nbytes > free:
        raise ResourceError(
            f"not enough disk space for {folder}: needs {needed_nbytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB free; free some or choose an output on another disk"
        )
    return free


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def incomplete_path(out: Path) -> Path:
    """Where a folder is kept that was written but failed its verification."""
    return out.with_name(f"{out.name}.incomplete")


def find_stale_folders(out: Path) -> list[Path]:
    """Working folders of ``out`` that an interrupted run left behind.

    A working folder is ours by its name, and stale when nobody holds its lock (a dead process holds none).
    """
    pattern = re.compile(rf"^\.{re.escape(out.name)}\.partial-[0-9a-f]{{8}}$")
    if not out.parent.is_dir():
        return []
    found = [entry for entry in sorted(out.parent.iterdir()) if pattern.match(entry.name) and entry.is_dir()]
    return [entry for entry in found if _unlocked(entry)]


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a hidden working folder that becomes ``out`` when the block ends well.

    On an error the working folder is removed, so that nothing looks complete. On a
    :class:`VerificationError` it is kept as ``OUT.incomplete`` for inspection, with the findings in
    INCOMPLETE.txt and ``config.json`` renamed, so that no loader takes it for a model. Stale working
    folders of the same output are removed first.

    Args:
        out: Final folder; must not exist.
    Yields:
        The working folder, empty.
    Raises:
        OutputExists: ``out`` is taken, before the block or (by somebody else) at its end.
        UsageError: The parent folder cannot be written.
    """
    require_absent(out)
    for stale in find_stale_folders(out):
        shutil.rmtree(stale, ignore_errors=True)
    working = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    try:
        working.mkdir(parents=True)
        lock = _lock(working)
    except OSError as error:
        raise UsageError(f"cannot write in {out.parent}: {error.strerror or error}") from error
    try:
        yield working
        _sync_folder(working)
        _refuse_taken(out)
        working.rename(out)
    except VerificationError as error:
        _keep_incomplete(working, incomplete_path(out), str(error))
        raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int:
    """Hold the folder for this process: the lock goes with the descriptor, also when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    # Some network file systems know no locks; then nothing of theirs is ever taken for stale.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _unlocked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _sync_folder(folder: Path) -> None:
    """Bring every file to disk before the name that says "complete" appears."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _keep_incomplete(working: Path, kept: Path, findings: str) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    config = working / "config.json"
    if config.exists():
        config.rename(working / "config.json.incomplete")
    (working / _MARKER).write_text(f"This checkpoint failed its verification; do not use it.\n\n{findings}\n")
    working.rename(kept)
