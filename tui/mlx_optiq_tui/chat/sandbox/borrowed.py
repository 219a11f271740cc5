"""The folders of one run: its workspace, made where it is missing, and a scratch folder that goes with it.

Scratch lies on the workspace's disk: the system's own /tmp may be memory, which nothing would count. On macOS
it is a disk, and programs need its short path. Used by ``sandbox.run``, on worker threads.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
from pathlib import Path

from mlx_optiq_ext.formats.atomic import unwritable
from mlx_optiq_tui.chat.sandbox.place import Launcher, Place
from mlx_optiq_tui.chat.sandbox.usage import open_folders, remove_folder

__all__ = ["Borrowed"]

_PREFIX = "optiq-sandbox-"


class Borrowed:
    """Both folders, until they are given back; what a dashboard that was killed left beside them goes.

    Args:
        launcher: Whose programs will write there.
        workspace: Kept.
    Raises:
        ResourceError: They cannot be made.
    """

    def __init__(self, launcher: Launcher, workspace: Path) -> None:
        beside = None if sys.platform == "darwin" else workspace.parent
        try:
            workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
            if beside is not None:
                _clear(beside)
            scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=beside)).resolve()
            self._held = _hold(scratch)
            self.place = Place(workspace=workspace.resolve(), scratch=scratch)
            if launcher.user is not None:
                for folder in (self.place.workspace, scratch):
                    os.chown(folder, launcher.user, launcher.user)
        except OSError as error:
            raise unwritable(workspace, error) from error

    def give_back(self) -> None:
        """Remove the scratch folder; let the owner into folders of the workspace that a program closed."""
        with contextlib.suppress(OSError):
            open_folders(self.place.workspace)
        with contextlib.suppress(OSError):
            remove_folder(self.place.scratch)
        if self._held is not None:
            os.close(self._held)


def _hold(scratch: Path) -> int | None:
    """Mark a scratch folder as used for as long as the file stays open; None where somebody else uses it."""
    held = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    return held


def _clear(beside: Path) -> None:
    for scratch in beside.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            held = _hold(scratch)
            if held is not None:
                remove_folder(scratch)
                os.close(held)
