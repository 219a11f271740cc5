"""Conversations on disk: one JSON file each, beside it a folder for pictures and for the tools' workspace.

Files appear complete or not at all. Knows no server and no widget; used by the chat screen.
"""

import hashlib
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.formats.atomic import unwritable, write_bytes_atomic, write_json_atomic
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_tui.chat.conversation import (
    ChatSettings,
    Conversation,
    Draft,
    StoredImage,
    UserMessage,
    as_markdown,
    title_of,
)
from mlx_optiq_tui.chat.sandbox.usage import remove_folder
from mlx_optiq_tui.user_folder import user_folder

__all__ = ["ConversationChanged", "ConversationEntry", "ConversationStore", "data_folder"]

T = TypeVar("T", bound=msgspec.Struct)

_FORM = RecordForm(name="conversation", remedy="delete it, or repair the file by hand")
_ID = re.compile(r"^[0-9]{8}-[0-9]{6}-[0-9a-f]{6}$")
_DRAFT, _IMAGES = "draft.json", "images"
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}


class ConversationChanged(UsageError):
    """Another dashboard wrote the conversation meanwhile."""


class ConversationEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the list."""

    id: str
    name: str
    changed: float
    turns: int = 0
    """Questions."""
    has_draft: bool = False
    problem: str = ""
    """Why it cannot be opened."""


def data_folder() -> Path:
    """Where this user's conversations are kept."""
    return user_folder() / "conversations"


class ConversationStore:
    """The conversations in one folder.

    Args:
        folder: Made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: dict[str, tuple[int, int]] = {}

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
        stamp = _stamp(file)
        conversation = _read(file, Conversation)
        if conversation.id != id:
            raise UsageError(
                f"{file} is another conversation's file, {conversation.id!r}; delete one of them"
            )
        self._stamps[id] = stamp
        return conversation

    def entries(self, words: str = "") -> list[ConversationEntry]:
        """Those that have all these words in name, text or draft; the one that was changed last first."""
        files = [path for path in self.folder.glob("*.json") if _ID.match(path.stem)]
        found = (self._entry(path, words.casefold().split()) for path in files)
        return sorted((entry for entry in found if entry), key=lambda entry: -entry.changed)

    def keep_draft(self, conversation: Conversation, draft: Draft) -> None:
        """Keep what is written and not sent; a conversation without anything else goes with its draft.

        Raises:
            ResourceError: See :meth:`save`.
        """
        file = self._beside(conversation.id) / _DRAFT
        if draft != Draft():
            if not self._file(conversation.id).exists():
                self._write(conversation)
            write_json_atomic(file, draft)
        elif file.exists():
            if conversation.messages or conversation.title:
                with suppress(FileNotFoundError):
                    file.unlink()
            else:
                self.delete(conversation.id)

    def draft(self, id: str) -> Draft:
        """What was written; nothing where that is not readable."""
        try:
            return _read(self._beside(id) / _DRAFT, Draft)
        except OptiqError:
            return Draft()

    def last_draft(self) -> Conversation | None:
        """The conversation that was written in last and not sent, where there is one."""
        drafts = sorted(self.folder.glob(f"*/{_DRAFT}"), key=lambda file: -_stamp(file)[0])
        for file in drafts:
            with suppress(OptiqError):
                return self.open(file.parent.name)
        return None

    def fork(self, conversation: Conversation) -> Conversation:
        """A conversation of its own that begins the same, with its pictures.

        Raises:
            ResourceError: See :meth:`save`.
        """
        copy = msgspec.structs.replace(
            conversation, id=self.new().id, title=f"{conversation.name} (copy)", changed=time.time()
        )
        pictures = self._beside(conversation.id) / _IMAGES
        try:
            if pictures.is_dir():
                shutil.copytree(pictures, self._beside(copy.id) / _IMAGES)
        except OSError as error:
            raise unwritable(self._beside(copy.id), error) from error
        return self._write(copy)

    def delete(self, id: str) -> None:
        """Remove one with its pictures and its workspace.

        Raises:
            ResourceError: The folder cannot be written.
        """
        file = self._file(id)
        self._stamps.pop(id, None)
        try:
            file.unlink(missing_ok=True)
            if self._beside(id).exists():
                remove_folder(self._beside(id))
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
                path = self.image_path(conversation.id, image)
                if path.is_file():
                    write_bytes_atomic(pictures / path.name, path.read_bytes())
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
        return self._beside(id) / _IMAGES / Path(image.file).name

    def workspace(self, id: str) -> Path:
        """The folder that this conversation's tools may write in; not made yet."""
        return self._beside(id) / "workspace"

    def _write(self, conversation: Conversation) -> Conversation:
        self._make_folder(self.folder)
        file = self._file(conversation.id)
        if self._stamps.get(conversation.id, _stamp(file)) != _stamp(file):
            raise ConversationChanged(f"{file} was changed by another dashboard; open it again")
        write_json_atomic(file, conversation)
        self._stamps[conversation.id] = _stamp(file)
        return conversation

    def _entry(self, path: Path, words: list[str]) -> ConversationEntry | None:
        draft = self.draft(path.stem)
        try:
            read = _read(path, Conversation)
        except OptiqError as error:
            if words:
                return None
            return ConversationEntry(
                id=path.stem, name=path.name, changed=_stamp(path)[0] / 1e9, problem=str(error)
            )
        said = (message.text for message in read.messages)
        text = "\n".join((read.name, draft.text, *said)).casefold() if words else ""
        if not all(word in text for word in words):
            return None
        turns = sum(isinstance(message, UserMessage) for message in read.messages)
        name = read.name if read.messages or read.title else title_of((UserMessage(text=draft.text),))
        return ConversationEntry(
            id=path.stem, name=name, changed=read.changed, turns=turns, has_draft=draft != Draft()
        )

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
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)
        except OSError as error:
            raise unwritable(folder, error) from error


def _read(file: Path, kind: type[T]) -> T:
    return convert_record(parse_json(read_record(file, _FORM), str(file), _FORM), kind, str(file), _FORM)


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written: its time (ns) and its number; zeros where there is none."""
    try:
        told = file.stat()
    except OSError:
        return 0, 0
    return told.st_mtime_ns, told.st_ino
