"""What the chat screen works on: the open conversation, what goes along with the next question.

Knows no widget and no server.
"""

import shutil
import tempfile
from pathlib import Path

import msgspec

from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.types.status import EngineStatus, ServedModel
from mlx_optiq_tui.chat.conversation import ChatSettings, Conversation, Draft, StoredImage, UserMessage, named
from mlx_optiq_tui.chat.pictures import Picture
from mlx_optiq_tui.chat.plain import plain
from mlx_optiq_tui.chat.store import ConversationChanged, ConversationStore, data_folder
from mlx_optiq_tui.chat.tools import ToolBox
from mlx_optiq_tui.chat.turn import settled

__all__ = ["Desk", "answering_name", "served_model"]


class Desk:
    """One conversation at a time.

    Args:
        is_demo: Keep nothing beyond this run of the dashboard.
    """

    def __init__(self, *, is_demo: bool) -> None:
        self._borrowed = Path(tempfile.mkdtemp(prefix="optiq-demo-")) if is_demo else None
        self.store = ConversationStore(self._borrowed or data_folder())
        self._is_closed = False
        self.open(self.store.last_draft() or self.store.new())

    def open(self, conversation: Conversation) -> None:
        """Work on another one; what was allowed in the one before is not allowed here."""
        # A dashboard that was killed may have left calls without an answer, which no model takes.
        self.conversation = settled(conversation)
        draft = self.store.draft(conversation.id)
        self.written = draft.text
        """What was written when it was left."""
        self.pictures: tuple[StoredImage, ...] = draft.images
        self.is_editing = draft.is_editing
        self.allowed: set[str] = set()
        self.tools = ToolBox(self.store.workspace(conversation.id))

    def use(self, settings: ChatSettings) -> None:
        """Ask for the next answers so."""
        self.conversation = msgspec.structs.replace(self.conversation, settings=settings)

    def attach(self, picture: Picture) -> None:
        """Send it with the next question."""
        label = f"{picture.label} {picture.width}×{picture.height}"
        image = self.store.keep_image(self.conversation.id, picture.data, picture.media_type, label)
        if picture.preview:
            write_bytes_atomic(self._preview(image), picture.preview)
        if image not in self.pictures:
            self.pictures = (*self.pictures, image)

    def detach(self) -> None:
        """Send all but the last picture."""
        self.pictures = self.pictures[:-1]

    def asking(self, text: str) -> Conversation:
        """The conversation with this question at its end: in place of the last one where that is edited."""
        question = UserMessage(text=text, images=self.pictures)
        if self.is_editing:
            return self.conversation.asking_instead(question)
        return self.conversation.with_messages(question)

    def asking_again(self) -> Conversation | None:
        """The conversation up to the last question; None where nothing was asked."""
        _, asked = self.conversation.before_last_question()
        return self.conversation.asking_instead(asked) if asked else None

    def keep(self, conversation: Conversation) -> None:
        """Go on with it, and write it to disk; as a copy where another dashboard wrote it meanwhile.

        Raises:
            ConversationChanged: It goes on as a copy; said once.
            ResourceError: The disk is full or the folder cannot be written.
        """
        here = self.conversation
        self.conversation = msgspec.structs.replace(conversation, id=here.id, title=here.title)
        if self._is_closed:
            return
        try:
            self.conversation = self.store.save(self.conversation)
        except ConversationChanged as error:
            self.conversation = self.store.fork(self.conversation)
            self.tools = ToolBox(self.store.workspace(self.conversation.id))
            raise ConversationChanged(
                "another dashboard changed this conversation; here it goes on as a copy"
            ) from error

    def keep_draft(self, text: str) -> None:
        """Keep what is written and not sent.

        Raises:
            ResourceError: See :meth:`keep`.
        """
        if not self._is_closed:
            draft = Draft(text=text, images=self.pictures, is_editing=self.is_editing)
            self.store.keep_draft(self.conversation, draft)

    def shown(self, images: tuple[StoredImage, ...]) -> list[tuple[Path, str]]:
        """Path and label of pictures; of large ones, the path of their preview."""
        found = []
        for image in images:
            preview = self._preview(image)
            path = preview if preview.is_file() else self.store.image_path(self.conversation.id, image)
            found.append((path, plain(image.label)))
        return found

    def _preview(self, image: StoredImage) -> Path:
        return self.store.image_path(self.conversation.id, image).with_suffix(".preview.png")

    def read_image(self, image: StoredImage) -> bytes:
        """A picture's bytes; none where somebody removed the file."""
        path = self.store.image_path(self.conversation.id, image)
        return path.read_bytes() if path.is_file() else b""

    def close(self) -> None:
        """Keep nothing more, and remove what the demo kept."""
        # A conversation of one's own may still be written to: an answer that was cut tells so last.
        self._is_closed = self._borrowed is not None
        if self._borrowed is not None:
            shutil.rmtree(self._borrowed, ignore_errors=True)


def served_model(settings: ChatSettings, status: EngineStatus | None) -> ServedModel | None:
    """The model that will answer, as far as it is known."""
    models = status.models if status else ()
    wanted = [model for model in models if settings.model in (model.id, *model.aliases)]
    return next(iter(wanted or [model for model in models if model.loaded]), None)


def answering_name(settings: ChatSettings, status: EngineStatus | None) -> str:
    """Model and adapter that will answer, as requests name them."""
    model = served_model(settings, status)
    default = next((each.name for each in status.adapters if each.is_default), "") if status else ""
    known = msgspec.structs.replace(
        settings,
        model=settings.model or (model.id if model else ""),
        adapter=settings.adapter or default,
    )
    return named(known)
