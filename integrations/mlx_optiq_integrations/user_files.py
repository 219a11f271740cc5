"""Change a user's configuration file so that it can be taken back.

Knows files and their backups, and no client. The file is replaced in one step; a copy of what was there stays
beside it, and a record of the change in the user's state folder.
"""

import difflib
import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import ResourceError, UsageError
from mlx_optiq_ext.formats.atomic import write_bytes_atomic, write_json_atomic
from mlx_optiq_integrations.client import ConfigFile
from mlx_optiq_integrations.hide import hide_blocks, hide_keys
from mlx_optiq_integrations.merge import Unreadable, merged_text

__all__ = ["Change", "UserFiles"]

_BACKUP = ".before-optiq"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One file before and after."""

    path: Path
    before: str | None
    """None: there is no such file."""
    after: str | None
    """None: it goes away."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing would change."""
        return self.before == self.after

    @property
    def diff(self) -> str:
        """The change as a unified diff, for a screen: values of keys and tokens are left out."""
        lines = difflib.unified_diff(
            hide_blocks(self.before or "").splitlines(keepends=True),
            hide_blocks(self.after or "").splitlines(keepends=True),
            "/dev/null" if self.before is None else str(self.path),
            "/dev/null" if self.after is None else str(self.path),
        )
        text = "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at the end\n" for line in lines
        )
        return hide_keys(text)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to a file."""

    path: str
    backup: str | None
    """Where the former content is; None: there was no file."""
    written_sha256: str
    earlier: "_Record | None" = None
    """What was done before others changed the file and it was written again."""


class UserFiles:
    """The configuration files of one user.

    Args:
        environ: Of the process.
        home: Stands for ``~``.
    """

    def __init__(self, environ: Mapping[str, str], home: Path) -> None:
        self._environ = environ
        self._home = home
        state = environ.get("XDG_STATE_HOME", "")
        self._records = (Path(state) if state else home / ".local" / "state") / "mlx-optiq-ext" / "changed"

    def planned(self, file: ConfigFile) -> Change:
        """What writing the settings would change.

        Raises:
            Unreadable: What is there cannot be read.
            UsageError: The extra ``clients`` is not installed.
        """
        path = file.locate(self._environ, self._home).resolve()
        before = _read(path)
        try:
            after = merged_text(file.format, before or "", file.settings)
        except Unreadable as error:
            raise Unreadable(f"{path}: {error}; nothing was changed") from error
        return Change(path=path, before=before, after=after)

    def write(self, change: Change) -> Path | None:
        """Make a change.

        Returns:
            Where the former content is; None: there was none.
        Raises:
            UsageError: The file has changed since the change was planned.
            ResourceError: It cannot be written.
        """
        if _read(change.path) != change.before:
            raise UsageError(f"{change.path} has changed meanwhile; nothing was written, try again")
        assert change.after is not None
        after = change.after.encode()
        known = self._record(change.path)
        earlier = known
        if known is not None and self.is_as_written(change):
            # Ours already: what was there before the first time is what --undo brings back.
            backup, earlier = Path(known.backup) if known.backup else None, known.earlier
        elif change.before is not None:
            backup = _free_name(change.path)
            write_bytes_atomic(backup, change.before.encode(), mode=_mode(change.path))
        else:
            backup = None
        mode = 0o600 if change.before is None else _mode(change.path)
        write_bytes_atomic(change.path, after, mode=mode)
        record = _Record(
            path=str(change.path),
            backup=str(backup) if backup else None,
            written_sha256=_digest(change.after),
            earlier=earlier,
        )
        write_json_atomic(self._record_file(change.path), record)
        return backup

    def planned_undo(self, file: ConfigFile) -> Change:
        """What bringing back the former content would change.

        Raises:
            UsageError: We have not changed this file, or its backup is gone.
        """
        path = file.locate(self._environ, self._home).resolve()
        record = self._record(path)
        if record is None:
            raise UsageError(f"{path} was not changed by `optiq snippet --write`; there is nothing to undo")
        former = _read(Path(record.backup)) if record.backup else None
        if record.backup and former is None:
            raise UsageError(f"{path} cannot be brought back: its copy {record.backup} is gone")
        return Change(path=path, before=_read(path), after=former)

    def is_as_written(self, change: Change) -> bool:
        """Whether nobody else has changed the file since we wrote it, or not so that it matters."""
        record = self._record(change.path)
        return change.is_empty or (
            record is not None
            and change.before is not None
            and record.written_sha256 == _digest(change.before)
        )

    def undo(self, change: Change) -> None:
        """Bring back what was there before, or take the file away where there was none.

        Where others had changed the file between two writes, that is what comes back; once more, the former.

        Raises:
            ResourceError: It cannot be written.
        """
        record = self._record(change.path)
        if change.after is not None:
            write_bytes_atomic(change.path, change.after.encode(), mode=_mode(change.path))
        else:
            change.path.unlink(missing_ok=True)
        if record is not None and record.backup:
            Path(record.backup).unlink(missing_ok=True)
        if record is not None and record.earlier is not None:
            write_json_atomic(self._record_file(change.path), record.earlier)
        else:
            self._record_file(change.path).unlink(missing_ok=True)

    def _record_file(self, path: Path) -> Path:
        return self._records / f"{_digest(str(path))[:16]}.json"

    def _record(self, path: Path) -> _Record | None:
        try:
            return msgspec.json.decode(self._record_file(path).read_bytes(), type=_Record)
        except (OSError, msgspec.MsgspecError):
            return None


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} is not UTF-8 text; nothing was changed") from error
    except OSError as error:
        raise ResourceError(f"cannot read {path}: {error.strerror}") from error


def _free_name(path: Path) -> Path:
    """For a copy beside the file; no other copy is written over."""
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    copies = (path.with_name(path.name + _BACKUP + ending) for ending in endings)
    return next(copy for copy in copies if not copy.exists())


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode & 0o777
    except OSError:
        return 0o600


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
