"""What the chat screen works on: the open conversation, what goes along with the next question.

Knows no widget and no server.
"""

import shutil
import tempfile
from pathlib import Path

import msgspec

from mlx_optiq_ext.types.status import EngineStatus, ServedModel
from mlx_optiq_tui.chat.conversation import ChatSettings, Conversation, StoredImage, UserMessage, named
from mlx_optiq_tui.chat.pictures import Picture
from mlx_optiq_tui.chat.store import ConversationStore, data_folder
from mlx_optiq_tui.chat.tools import ToolBox

__all__ = ["Desk", "answering_name", "served_model"]


class Desk:
    """One conversation at a time.

    Args:
        is_demo: Keep nothing beyond this run of the dashboard.
    """

    def __init__(self, *, is_demo: bool) -> None:
        self._borrowed = Path(tempfile.mkdtemp(prefix="optiq-demo-")) if is_demo else None
        self.store = ConversationStore(self._borrowed or data_folder())
        self.open(self.store.new())

    def open(self, conversation: Conversation) -> None:
        """Work on another one; what was allowed in the one before is not allowed here."""
        self.conversation = conversation
        self.pictures: tuple[StoredImage, ...] = ()
        self.is_editing = False
        self.allowed: set[str] = set()
        self.tools = ToolBox(self.store.workspace(conversation.id))

    def use(self, settings: ChatSettings) -> None:
        """Ask for the next answers so."""
        self.conversation = msgspec.structs.replace(self.conversation, settings=settings)

    def attach(self, picture: Picture) -> None:
        """Send it with the next question."""
        label = f"{picture.label} {picture.width}×{picture.height}"
        image = self.store.keep_image(self.conversation.id, picture.data, picture.media_type, label)
        if image not in self.pictures:
            self.pictures = (*self.pictures, image)

    def detach(self) -> None:
        """Send all but the last picture."""
        self.pictures = self.pictures[:-1]

    def asking(self, text: str) -> Conversation:
        """The conversation with this question at its end: in place of the last one where that is edited."""
        before = self.conversation.before_last_question()[0] if self.is_editing else self.conversation
        return before.with_messages(UserMessage(text=text, images=self.pictures))

    def asking_again(self) -> Conversation | None:
        """The conversation up to the last question; None where nothing was asked."""
        before, asked = self.conversation.before_last_question()
        return before.with_messages(asked) if asked else None

    def keep(self, conversation: Conversation) -> None:
        """Go on with it, and write it to disk.

        Raises:
            ResourceError: The disk is full or the folder cannot be written.
        """
        self.conversation = conversation
        self.conversation = self.store.save(conversation)

    def shown(self, images: tuple[StoredImage, ...]) -> list[tuple[Path, str]]:
        """Path and label of pictures."""
        return [(self.store.image_path(self.conversation.id, each), each.label) for each in images]

    def read_image(self, image: StoredImage) -> bytes:
        """A picture's bytes; none where somebody removed the file."""
        path = self.store.image_path(self.conversation.id, image)
        return path.read_bytes() if path.is_file() else b""

    def close(self) -> None:
        """Remove what the demo kept."""
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
