"""What the chat screen does besides answers: settings, conversations, pictures, drafts.

Part of the screen, apart only to be read apart; each errand is a worker, for a dialog is waited for.
"""

import asyncio
from pathlib import Path

import msgspec
from textual import work
from textual.timer import Timer

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_tui.chat.composer import Composer, Prompt
from mlx_optiq_tui.chat.conversation import ChatSettings, Conversation
from mlx_optiq_tui.chat.desk import Desk
from mlx_optiq_tui.chat.dialogs import Chosen, ConversationList, LineForm
from mlx_optiq_tui.chat.pictures import Picture, clipboard_picture, read_picture
from mlx_optiq_tui.chat.settings_form import SettingsForm
from mlx_optiq_tui.chat.tools import SANDBOXED
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.question import Question

__all__ = ["Errands"]

_DRAFT_S = 1.0


class Errands(LabScreen):
    """The dialogs of the chat screen."""

    desk: Desk
    prompt: Prompt
    """Known when it is no longer on the screen, too."""
    _draft_timer: Timer | None = None

    @property
    def is_answering(self) -> bool:
        """Whether an answer is under way."""
        raise NotImplementedError

    async def draw_all(self, error: str = "") -> None:
        """Show the whole conversation anew."""
        raise NotImplementedError

    async def draw_pictures(self) -> None:
        """Show what goes along with the next message."""
        raise NotImplementedError

    def on_screen_suspend(self) -> None:
        """Keep what is written."""
        self.keep_draft()

    def on_text_area_changed(self) -> None:
        """Keep what is written, soon: a terminal may be closed at any time."""
        if self._draft_timer is None:
            self._draft_timer = self.set_timer(_DRAFT_S, self.keep_draft)

    def keep_draft(self) -> None:
        """Keep what is written and not sent."""
        if self._draft_timer is not None:
            self._draft_timer.stop()
            self._draft_timer = None
        try:
            self.desk.keep_draft(self.prompt.text)
        except OptiqError as error:
            self.notify(str(error), severity="warning")

    async def switch(self, conversation: Conversation) -> None:
        """Go to another conversation, and to what was written there."""
        self.desk.open(conversation)
        self.query_one(Composer).text = self.desk.written
        await self.draw_all()

    @work(exclusive=True, group="errand")
    async def action_settings(self) -> None:
        """Choose how the next answers are asked for."""
        form = SettingsForm(self.desk.conversation.settings, self.lab.status)
        settings: ChatSettings | None = await self.app.push_screen_wait(form)
        if settings is not None:
            await self._use(settings)

    async def _use(self, settings: ChatSettings) -> None:
        """Take settings, but code only where a sandbox holds; said once it was tried."""
        if SANDBOXED & set(settings.tools):
            try:
                await self.desk.tools.prepare()
            except OptiqError as error:
                self.notify(
                    f"Python and terminal stay off: {error}", severity="error", timeout=20, markup=False
                )
                allowed = tuple(name for name in settings.tools if name not in SANDBOXED)
                settings = msgspec.structs.replace(settings, tools=allowed)
        self.desk.use(settings)
        await self.draw_pictures()

    @work(exclusive=True, group="errand")
    async def action_new(self) -> None:
        """Begin another conversation with the same settings."""
        if self._is_free():
            self.keep_draft()
            await self.switch(self.desk.store.new(self.desk.conversation.settings))
            self.query_one(Composer).prompt.focus()

    @work(exclusive=True, group="errand")
    async def action_conversations(self) -> None:
        """Open, rename, export or delete a conversation."""
        while self._is_free():
            self.keep_draft()
            chosen: Chosen | None = await self.app.push_screen_wait(ConversationList(self.desk.store.entries))
            if chosen is None:
                return
            try:
                await self._do(chosen)
            except OptiqError as error:
                self.notify(str(error), severity="error")
            if chosen.deed == "open":
                return

    async def _do(self, chosen: Chosen) -> None:
        desk = self.desk
        if chosen.deed == "delete":
            await self._delete(chosen.id)
            return
        # The open one may have settings that are not on disk yet.
        is_here = chosen.id == desk.conversation.id
        conversation = desk.conversation if is_here else desk.store.open(chosen.id)
        if chosen.deed == "open":
            await self.switch(conversation)
        elif chosen.deed == "rename":
            title = await self.app.push_screen_wait(LineForm("Name of the conversation", conversation.name))
            if title:
                conversation = desk.store.rename(conversation, title)
                if is_here:
                    desk.conversation = conversation
                    await self.draw_all()
        else:
            named = Path.cwd() / f"{conversation.id}.md"
            file = await self.app.push_screen_wait(LineForm("Write as Markdown to", str(named)))
            if file:
                written = await asyncio.to_thread(desk.store.export, conversation, Path(file))
                self.notify(f"written: {written}")

    async def _delete(self, id: str) -> None:
        text = "Delete this conversation, its pictures and the files of its tools?"
        if await self.app.push_screen_wait(Question(text, yes="Delete")):
            await asyncio.to_thread(self.desk.store.delete, id)
            if id == self.desk.conversation.id:
                await self.switch(self.desk.store.new(self.desk.conversation.settings))

    @work(exclusive=True, group="errand")
    async def action_attach(self) -> None:
        """Attach a picture by its path, or from the clipboard."""
        hint = "Nothing written: the picture in the clipboard. A path pasted into the message works too."
        path = await self.app.push_screen_wait(LineForm("Path of a picture", hint=hint))
        if path is not None:
            await self._take_picture(path)

    @work(exclusive=True, group="errand")
    async def attach_file(self, path: str) -> None:
        """Attach a picture that was pasted by its path."""
        await self._take_picture(path)

    async def _take_picture(self, path: str) -> None:
        try:
            picture: Picture = (
                await asyncio.to_thread(read_picture, Path(path))
                if path
                else await asyncio.to_thread(clipboard_picture)
            )
            await asyncio.to_thread(self.desk.attach, picture)
        except OptiqError as error:
            self.notify(str(error), severity="error")
        await self.draw_pictures()

    def on_prompt_pasted(self, message: Prompt.Pasted) -> None:
        """Attach the picture."""
        self.attach_file(str(message.path))

    async def on_prompt_erased(self) -> None:
        """Remove a picture."""
        self.desk.detach()
        await self.draw_pictures()

    def _is_free(self) -> bool:
        if self.is_answering:
            self.notify("the model is still answering; Escape stops it", severity="warning")
        return not self.is_answering
