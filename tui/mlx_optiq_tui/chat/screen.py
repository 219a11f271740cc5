"""The chat: ask, read the answer as it comes, allow or refuse what tools would do, ask otherwise."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Static
from textual.worker import Worker

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.chat.composer import Composer
from mlx_optiq_tui.chat.consent_box import ConsentBox
from mlx_optiq_tui.chat.conversation import Conversation, Draft, ToolMessage, ToolUse, UserMessage
from mlx_optiq_tui.chat.desk import Desk, answering_name, served_model
from mlx_optiq_tui.chat.errands import Errands
from mlx_optiq_tui.chat.plain import plain
from mlx_optiq_tui.chat.settings_form import settings_words
from mlx_optiq_tui.chat.transcript import AnswerView, ErrorView, ToolView, Transcript, conversation_views
from mlx_optiq_tui.chat.turn import Decision, News, Turn
from mlx_optiq_tui.chat_stream import ChatDelta
from mlx_optiq_tui.lab import lab_of

__all__ = ["ChatScreen"]

_log = logging.getLogger(__name__)

_LATE_STOP_S = 0.5
"""An Escape so soon after an answer ended was meant for it."""

_EMPTY = (
    "Write below; Enter sends.\n\nCtrl+S chooses model, adapter, sampling and tools.\n"
    "Ctrl+O opens an earlier conversation, Ctrl+B attaches a picture."
)


class ChatScreen(Errands):
    """One conversation: its transcript, what a tool wants to do, and where the next message is written."""

    HELP_TEXT = """# Chat

Enter sends, Ctrl+J begins a new line, Escape stops the answer. A pasted or dropped path of a picture attaches
it; Backspace in an empty message removes it again. What is written and not sent is kept.

Ctrl+R asks the last question again, Ctrl+L edits it; F8 goes round the answers that were given.

Tools run after you allowed them: once, or for as long as this conversation is open. Python and terminal
commands run in a sandbox without network and see only the conversation's own folder.

Conversations are kept on this machine, each in a file of its own."""

    CSS = """
    ChatScreen #title { height: 1; padding: 0 1; color: $text-muted; text-style: bold; }
    ChatScreen.-short ConsentBox VerticalScroll { max-height: 5; }
    ChatScreen #empty { height: auto; padding: 1; color: $text-muted; }
    """
    AUTO_FOCUS = "Prompt"
    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "stop", "Stop"),
        ("ctrl+s", "settings", "Settings"),
        ("ctrl+r", "again", "Again"),
        ("ctrl+l", "edit", "Edit last"),
        ("ctrl+o", "conversations", "Open"),
        ("ctrl+n", "new", "New"),
        ("ctrl+b", "attach", "Picture"),
        ("ctrl+g", "thoughts", "Thoughts"),
        Binding("f8", "other_answer", "Other answer", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._answering: Worker[None] | None = None
        self._ended = 0.0

    def compose_body(self) -> ComposeResult:
        """Title, transcript, question of a tool, message."""
        yield Static(id="title", markup=False)
        yield Transcript()
        yield ConsentBox()
        yield Composer()

    def on_mount(self) -> None:
        """Begin a conversation, or go on where somebody was writing."""
        self.desk = Desk(is_demo=self.lab.is_demo)
        composer = self.query_one(Composer)
        composer.text = self.desk.written
        self.prompt = composer.prompt
        self.watch(lab_of(self), "connection", self._draw_next)
        self.call_later(self.draw_all)

    def on_unmount(self) -> None:
        """Keep what is written; leave nothing of the demo behind."""
        self.keep_draft()
        self.desk.close()

    @property
    def is_answering(self) -> bool:
        """Whether an answer, or a tool for it, is under way."""
        return self._answering is not None

    def status_changed(self, _: EngineStatus | None) -> None:
        """Models and adapters may have changed."""
        self._draw_next()

    def on_screen_resume(self) -> None:
        """A tool may have asked meanwhile."""
        box = self.query_one(ConsentBox)
        if box.is_asking and not self.query_one(Composer).text:
            box.take_focus()

    async def draw_all(self, error: str = "") -> None:
        """Show the whole conversation anew, and what went wrong last."""
        transcript = self.query_one(Transcript)
        await transcript.remove_children()
        messages = self.desk.conversation.messages
        if not messages and not error:
            await transcript.mount(Static(_EMPTY, id="empty", markup=False))
        await transcript.mount_all(conversation_views(messages, self.desk.shown))
        if error:
            await transcript.mount(ErrorView(error))
        transcript.anchor()
        await self.draw_pictures()
        self._draw_title()

    async def draw_pictures(self) -> None:
        """Show what goes along with the next message."""
        await self.query_one(Composer).show_pictures(self.desk.shown(self.desk.pictures))
        self._draw_next()

    def _draw_title(self) -> None:
        conversation = self.desk.conversation
        others = f" · one of {len(conversation.others) + 1} answers (F8)" if conversation.others else ""
        self.query_one("#title", Static).update(plain(conversation.name + others))

    def _draw_next(self) -> None:
        settings = self.desk.conversation.settings
        status, composer = self.lab.status, self.query_one(Composer)
        model = served_model(settings, status)
        if self.lab.connection.state != "connected":
            composer.say(self.lab.connection.words(self.lab.client.url), warning=True)
        elif self.desk.pictures and model is not None and not model.sees_images:
            composer.say(f"{model.id} sees no images: Backspace removes the picture", warning=True)
        elif self.desk.is_editing:
            composer.say(
                "Editing the last message: Enter asks anew, Escape leaves it as it was", warning=True
            )
        else:
            said = (answering_name(settings, status), settings_words(settings))
            composer.say(" · ".join(part for part in said if part) or "the server's model")

    def on_prompt_submitted(self) -> None:
        """Send what is written, where it can be."""
        composer, desk = self.query_one(Composer), self.desk
        text = composer.text.strip()
        model = served_model(desk.conversation.settings, self.lab.status)
        if self.is_answering:
            self.notify("the model is still answering; Escape stops it", severity="warning")
        elif desk.pictures and model is not None and not model.sees_images:
            self.notify(
                f"{model.id} sees no images; remove the picture, or choose another model", severity="warning"
            )
        elif text or desk.pictures:
            asked = desk.asking(text)
            sent = Draft(text=composer.text, images=desk.pictures, is_editing=desk.is_editing)
            # Now, for what is typed from here on belongs to the next message.
            composer.text, desk.pictures, desk.is_editing = "", (), False
            self._begin(asked, sent)

    def _begin(self, conversation: Conversation, sent: Draft | None = None) -> None:
        if not self.is_answering:
            self._answering = self._answer(conversation, sent)

    @work(group="answer")
    async def _answer(self, conversation: Conversation, sent: Draft | None) -> None:
        """Ask the question at the conversation's end; what was sent comes back where nothing was said."""
        desk, composer, before = self.desk, self.query_one(Composer), self.desk.conversation
        problem = self._keep(conversation)
        turn = Turn(self.lab.client, desk.conversation, desk.tools, self._consent, desk.read_image)
        turn.allowed = desk.allowed
        try:
            await self.draw_all()
            async with contextlib.aclosing(turn.run()) as news:
                await self._follow(turn, news)
        except OptiqError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - the worker's border: no answer ends the dashboard
            _log.exception("an answer failed")
            problem = f"{type(error).__name__}: {error}"
        finally:
            # Also where the answer was stopped, so nothing here waits.
            self._answering, self._ended = None, time.monotonic()
            was_cut = turn.cut(broke_off=bool(problem)) or bool(problem)
            if isinstance(turn.conversation.messages[-1], UserMessage):
                if sent is not None:
                    composer.text = "\n".join(filter(None, (sent.text, composer.text)))
                    desk.pictures, desk.is_editing = (*sent.images, *desk.pictures), sent.is_editing
                turn.conversation = before
                was_cut = True
            problem = self._keep(turn.conversation) or problem
            self.keep_draft()
            if was_cut and self.is_attached:
                self.call_later(self.draw_all, problem)

    def _keep(self, conversation: Conversation) -> str:
        """Write it; the reason where that is not possible."""
        try:
            self.desk.keep(conversation)
        except OptiqError as error:
            return str(error)
        return ""

    async def _follow(self, turn: Turn, news: AsyncIterator[News]) -> None:
        transcript = self.query_one(Transcript)
        view: AnswerView | None = None
        calls: dict[str, ToolUse] = {}
        async for each in news:
            if isinstance(each, ToolMessage):
                await transcript.mount(ToolView(calls.get(each.call_id), each))
                continue
            if view is None:
                view = AnswerView()
                await transcript.mount(view)
            if isinstance(each, ChatDelta):
                await view.add(each)
            else:
                await view.end(each)
                view = None
                calls.update({call.id: call for call in each.tool_calls})
                if problem := self._keep(turn.conversation):
                    self.notify(problem, severity="warning", timeout=15)

    async def _consent(self, call: ToolUse) -> Decision:
        box, composer = self.query_one(ConsentBox), self.query_one(Composer)
        if not self.is_current:
            self.notify(
                f"the chat asks whether {plain(call.name)} may run: key 3",
                severity="warning",
                timeout=15,
                markup=False,
            )
        elif not composer.text:
            self.call_after_refresh(box.take_focus)
        try:
            return await box.ask(call)
        finally:
            if self.is_current and self.focused is not None and box in self.focused.ancestors:
                composer.prompt.focus()

    async def action_stop(self) -> None:
        """Stop the answer; else leave the editing; else leave the field."""
        if self._answering is not None:
            self._answering.cancel()
        elif self.desk.is_editing:
            self.desk.is_editing, self.desk.pictures = False, ()
            self.query_one(Composer).text = ""
            self.keep_draft()
            await self.draw_pictures()
        elif time.monotonic() - self._ended > _LATE_STOP_S:
            # Else it was meant for the answer that ended just before.
            self.action_blur()

    def action_again(self) -> None:
        """Ask the last question anew."""
        conversation = self.desk.asking_again()
        if conversation is not None:
            self._begin(conversation)

    async def action_other_answer(self) -> None:
        """Show another of the answers to what was asked again or edited."""
        if self.desk.conversation.others and not self.is_answering:
            await self.draw_all(self._keep(self.desk.conversation.other_answer()))

    async def action_edit(self) -> None:
        """Write the last question anew; sent, it gets an answer of its own beside the one that is there."""
        _, asked = self.desk.conversation.before_last_question()
        if asked is not None and not self.is_answering:
            composer = self.query_one(Composer)
            composer.text = asked.text
            self.desk.is_editing, self.desk.pictures = True, asked.images
            await self.draw_pictures()
            composer.prompt.focus()

    def action_thoughts(self) -> None:
        """Unfold or fold what the model thought, of all answers shown."""
        for view in self.query(AnswerView):
            view.toggle_thoughts()
