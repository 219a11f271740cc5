"""Conversations on disk: one JSON file each, beside it a folder for pictures and for the tools' workspace.

Files appear complete or not at all. Knows no server and no widget; used by the chat screen.
"""

import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.formats.atomic import unwritable, write_bytes_atomic, write_json_atomic
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_tui.chat.conversation import (
    ChatSettings,
    Conversation,
    StoredImage,
    UserMessage,
    as_markdown,
)

__all__ = ["ConversationEntry", "ConversationStore", "data_folder"]

_FORM = RecordForm(name="conversation", remedy="delete it, or repair the file by hand")
_ID = re.compile(r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$")
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}


class ConversationEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the list."""

    id: str
    name: str
    changed: float
    turns: int = 0
    """Questions."""
    problem: str = ""
    """Why it cannot be opened."""


def data_folder() -> Path:
    """Where this user's conversations are kept.

    Source: XDG Base Directory Specification; macOS File System Programming Guide.
    """
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        named = os.environ.get("XDG_DATA_HOME", "")
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".local" / "share"
    return base / "mlx-optiq-ext" / "conversations"


class ConversationStore:
    """The conversations in one folder.

    Args:
        folder: Made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new(self, settings: ChatSettings | None = None) -> Conversation:
        """An empty conversation; not on disk yet."""
        now = time.time()
        id = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        return Conversation(id=id, created=now, changed=now, settings=settings or ChatSettings())

    def save(self, conversation: Conversation) -> Conversation:
        """Write it; returns it with the time of now.

        Raises:
            ResourceError: The disk is full or the folder cannot be written.
        """
        return self._write(msgspec.structs.replace(conversation, changed=time.time()))

    def rename(self, conversation: Conversation, title: str) -> Conversation:
        """Write it under another name, without making it the newest.

        Raises:
            ResourceError: See :meth:`save`.
        """
        return self._write(msgspec.structs.replace(conversation, title=title))

    def open(self, id: str) -> Conversation:
        """Read one.

        Raises:
            UsageError: It is not there, or not readable.
        """
        file = self._file(id)
        document = parse_json(read_record(file, _FORM), str(file), _FORM)
        return convert_record(document, Conversation, str(file), _FORM)

    def entries(self) -> list[ConversationEntry]:
        """All of them, the one that was changed last first."""
        files = [path for path in self.folder.glob("*.json") if _ID.match(path.stem)]
        return sorted((self._entry(path) for path in files), key=lambda entry: -entry.changed)

    def delete(self, id: str) -> None:
        """Remove one with its pictures and its workspace.

        Raises:
            ResourceError: The folder cannot be written.
        """
        file = self._file(id)
        try:
            file.unlink(missing_ok=True)
            if self._beside(id).exists():
                shutil.rmtree(self._beside(id))
        except OSError as error:
            raise unwritable(file, error) from error

    def export(self, conversation: Conversation, file: Path) -> Path:
        """Write it as Markdown, with its pictures in a folder beside where it has any.

        Returns:
            The file.
        Raises:
            UsageError: The file exists.
            ResourceError: It cannot be written.
        """
        file = file.expanduser().absolute()
        if file.exists():
            raise UsageError(f"{file} already exists; choose another name")
        pictures = file.with_name(f"{file.stem}-images")
        for message in conversation.messages:
            for image in message.images if isinstance(message, UserMessage) else ():
                write_bytes_atomic(
                    pictures / image.file, self.image_path(conversation.id, image).read_bytes()
                )
        write_bytes_atomic(file, as_markdown(conversation, pictures.name).encode())
        return file

    def keep_image(self, id: str, data: bytes, media_type: str, label: str) -> StoredImage:
        """Keep a picture; equal ones once."""
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{_SUFFIXES[media_type]}"
        image = StoredImage(file=name, media_type=media_type, label=label)
        path = self.image_path(id, image)
        if not path.exists():
            self._make_folder(self.folder)
            write_bytes_atomic(path, data)
        return image

    def image_path(self, id: str, image: StoredImage) -> Path:
        """Where a picture lies."""
        return self._beside(id) / "images" / Path(image.file).name

    def workspace(self, id: str) -> Path:
        """The folder that this conversation's tools may write in; not made yet."""
        return self._beside(id) / "workspace"

    def _write(self, conversation: Conversation) -> Conversation:
        self._make_folder(self.folder)
        write_json_atomic(self._file(conversation.id), conversation)
        return conversation

    def _entry(self, path: Path) -> ConversationEntry:
        try:
            read = self.open(path.stem)
        except OptiqError as error:
            return ConversationEntry(
                id=path.stem, name=path.name, changed=path.stat().st_mtime, problem=str(error)
            )
        turns = sum(isinstance(message, UserMessage) for message in read.messages)
        return ConversationEntry(id=read.id, name=read.name, changed=read.changed, turns=turns)

    def _file(self, id: str) -> Path:
        if not _ID.match(id):
            raise UsageError(f"{id!r} names no conversation")
        return self.folder / f"{id}.json"

    def _beside(self, id: str) -> Path:
        return self._file(id).with_suffix("")

    def _make_folder(self, folder: Path) -> None:
        """What people say to a model is nobody else's business."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
