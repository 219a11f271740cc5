"""The chat screen against a real model, a scripted engine behind the real server, and the recording."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image as PILImage
from support_engine import FakeEngine, Script, Until, answer, call, ready_status
from support_http import live
from support_serving import engine_on, spec_of, tiny_folder
from support_tui import NARROW, WIDE, demo_lab, lab_at, piloted, screen_text, until
from textual import events
from textual.pilot import Pilot
from textual.widgets import Button, Checkbox, Collapsible, Input, Markdown, OptionList, Static

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.types.chat import Image, Text
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.chat import consent_box, tools
from mlx_optiq_tui.chat.composer import Composer, Prompt
from mlx_optiq_tui.chat.consent_box import ConsentBox
from mlx_optiq_tui.chat.conversation import (
    AnswerStats,
    AssistantMessage,
    ChatSettings,
    ToolMessage,
    ToolUse,
    UserMessage,
)
from mlx_optiq_tui.chat.dialogs import ConversationList, LineForm
from mlx_optiq_tui.chat.sandbox import probe
from mlx_optiq_tui.chat.screen import ChatScreen
from mlx_optiq_tui.chat.settings_form import SettingsForm, parse_number
from mlx_optiq_tui.chat.store import ConversationStore
from mlx_optiq_tui.chat.tools import Found
from mlx_optiq_tui.chat.transcript import AnswerView, ErrorView, QuestionView, ToolView
from mlx_optiq_tui.chat.turn import settled

Steps = Callable[[Pilot[Any], "Chat"], Any]
SEARCH = answer(*call("web_search", '{"query": "weather"}'), reason="tool_calls")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConversationStore:
    """Where the screen keeps conversations: not where people do."""
    folder = tmp_path / "kept"
    monkeypatch.setattr("mlx_optiq_tui.chat.desk.data_folder", lambda: folder)
    return ConversationStore(folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a script are not hasty."""
    monkeypatch.setattr(consent_box, "_HASTY_S", 0.0)


class Chat:
    """The open chat screen."""

    def __init__(self, app: LabApp) -> None:
        self.app = app

    @property
    def screen(self) -> ChatScreen:
        screen = self.app.get_screen_stack("chat")[0]
        assert isinstance(screen, ChatScreen)
        return screen

    @property
    def messages(self) -> tuple[Any, ...]:
        return self.screen.desk.conversation.messages

    @property
    def text(self) -> str:
        return self.screen.query_one(Composer).text

    @property
    def shown(self) -> str:
        return screen_text(self.app)

    @property
    def line(self) -> str:
        return str(self.screen.query_one("#next").render())

    async def say(self, pilot: Pilot[Any], text: str) -> None:
        """Write and send it."""
        self.screen.query_one(Composer).text = text
        self.screen.query_one(Prompt).focus()
        await pilot.press("enter")

    async def ask(self, pilot: Pilot[Any], text: str) -> None:
        """Send it and wait for the whole answer."""
        await self.say(pilot, text)
        await self.answered(pilot)

    async def answered(self, pilot: Pilot[Any]) -> None:
        """Wait until nothing is under way."""
        await pilot.pause()
        await until(pilot, lambda: not self.screen.is_answering)
        await pilot.pause()


def chat(app: LabApp, steps: Steps, size: tuple[int, int] = NARROW) -> None:
    """Run steps on the chat screen."""

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: app.current_mode == "chat" and isinstance(app.focused, Prompt))
        await steps(pilot, Chat(app))

    piloted(app, script, size)


@contextmanager
def scripted(*scripts: Script, status: EngineStatus | None = None) -> Iterator[tuple[LabApp, FakeEngine]]:
    engine = FakeEngine(*scripts, status=status)
    with live(engine) as url:
        yield lab_at(url, "chat"), engine


def seeing() -> EngineStatus:
    """A server whose model sees images."""
    status = ready_status()
    model = msgspec.structs.replace(status.models[0], sees_images=True)
    return msgspec.structs.replace(status, models=(model, *status.models[1:]))


def test_a_real_model_answers_and_the_conversation_is_kept(tmp_path: Path, store: ConversationStore) -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        chat.screen.desk.use(ChatSettings(max_tokens=6, temperature=0.0))
        await chat.ask(pilot, "Say something")
        asked, said = chat.messages
        assert asked == UserMessage(text="Say something")
        assert isinstance(said, AssistantMessage)
        assert (said.end, said.stats.completion_tokens) == ("length", 6)
        await until(pilot, lambda: "6 out · token limit" in chat.shown)
        assert "first token" in chat.shown
        assert chat.text == ""

    engine = engine_on(spec_of(tiny_folder(tmp_path / "tiny")))
    try:
        with live(engine) as url:
            chat(lab_at(url, "chat"), steps)
    finally:
        engine.close()
    (entry,) = store.entries()
    assert [type(message) for message in store.open(entry.id).messages] == [UserMessage, AssistantMessage]


def test_settings_go_along_with_the_next_message() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await until(pilot, lambda: chat.line == "org/tiny")
        await pilot.press("ctrl+s")
        form = chat.app.screen
        assert isinstance(form, SettingsForm)
        for name, value in {"temperature": "3", "seed": "7", "max_tokens": "20"}.items():
            form.query_one(f"#{name}", Input).value = value
        form.query_one("#effort").value = "low"  # type: ignore[attr-defined]
        await pilot.press("ctrl+s")
        assert "temperature takes a number from 0 to 2, not '3'" in chat.shown
        form.query_one("#temperature", Input).value = "0.5"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "temperature 0.5" in chat.line)
        assert chat.line == "org/tiny · temperature 0.5 · max tokens 20 · seed 7 · thinking low"
        await chat.ask(pilot, "Hello")
        (request,) = engine.requests
        assert (request.sampling.temperature, request.sampling.seed, request.max_tokens) == (0.5, 7, 20)
        assert request.reasoning.effort == "low"
        assert request.session == chat.screen.desk.conversation.id
        assert "64 cached · 12 out" in chat.shown

    with scripted() as (app, engine):
        chat(app, steps)


def test_numbers_outside_their_bounds_are_refused() -> None:
    assert parse_number("seed", " ") is None
    assert parse_number("top_p", "0.9") == 0.9
    for name, text in (("max_tokens", "0"), ("max_tokens", "1.5"), ("top_p", "2"), ("temperature", "nan")):
        with pytest.raises(Exception, match="takes a"):
            parse_number(name, text)


def test_thoughts_are_folded_until_asked_for() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "Why?")
        assert "Thought: 3 words" in chat.shown
        assert "I ponder it" not in chat.shown
        await pilot.press("ctrl+g")
        await until(pilot, lambda: "I ponder it" in chat.shown)
        assert chat.screen.query_one(Markdown).source == "**Because**"

    with scripted(answer("**Because**", reasoning="I ponder it")) as (app, _):
        chat(app, steps)


def test_escape_stops_and_keeps_what_was_said() -> None:
    wait = Until()

    def halting(request: Any) -> Any:
        steps = list(answer("The beginning")(request))
        yield from steps[:-1]
        yield wait
        yield steps[-1]

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.say(pilot, "Go on")
        await until(pilot, lambda: "The beginning" in chat.shown)
        await pilot.press("x", "enter")  # the next message can be written, not sent
        assert chat.text == "x"
        await pilot.press("escape")
        await chat.answered(pilot)
        await pilot.press("escape")  # Too late for the answer: the field is not left.
        assert chat.screen.focused is not None
        assert [type(message) for message in chat.messages] == [UserMessage, AssistantMessage]
        assert (chat.messages[1].text, chat.messages[1].end) == ("The beginning", "stopped")
        await until(pilot, lambda: "stopped" in chat.shown)
        await until(pilot, lambda: bool(engine.cancelled))
        assert chat.text == "x"

    with scripted(halting) as (app, engine):
        chat(app, steps)


def test_a_refusal_is_told_in_the_servers_words_and_the_text_comes_back(store: ConversationStore) -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "A long story")
        await until(pilot, lambda: bool(chat.screen.query(ErrorView)))
        assert "prompt is too long: 9 tokens" in chat.shown
        assert (chat.messages, chat.text) == ((), "A long story")
        engine.refuse = None
        await chat.ask(pilot, chat.text)
        assert len(chat.messages) == 2
        engine.refuse = RequestError("nothing more today")
        await pilot.press("ctrl+r")
        await chat.answered(pilot)
        assert len(chat.messages) == 2  # the earlier answer stays
        await until(pilot, lambda: "nothing more today" in chat.shown)

    with scripted() as (app, engine):
        engine.refuse = RequestError("prompt is too long: 9 tokens")
        chat(app, steps)


def test_without_a_server_nothing_is_lost() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await until(pilot, lambda: "no optiq server answers" in chat.line)
        await chat.ask(pilot, "Anybody?")
        await until(pilot, lambda: bool(chat.screen.query(ErrorView)))
        assert chat.text == "Anybody?"

    chat(lab_at("http://127.0.0.1:9", "chat"), steps)


def test_asking_again_and_editing_replace_the_last_answer() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "First")
        await pilot.press("ctrl+r")
        await chat.answered(pilot)
        assert [message.text for message in chat.messages] == ["First", "two"]
        await pilot.press("ctrl+l")
        assert chat.text == "First"
        assert "Editing the last message" in chat.line
        await pilot.press("escape")
        assert (chat.text, len(chat.messages)) == ("", 2)
        await pilot.press("ctrl+l", *" edited", "enter")
        await chat.answered(pilot)
        assert [message.text for message in chat.messages] == ["First edited", "three"]
        assert len(chat.screen.query(QuestionView)) == 1

    with scripted(answer("one"), answer("two"), answer("three")) as (app, engine):
        chat(app, steps)
    parts = [part for request in engine.requests for message in request.messages for part in message.parts]
    assert [part.text for part in parts if isinstance(part, Text)] == ["First", "First", "First edited"]


def offered(chat: Chat, *names: str) -> None:
    settings = chat.screen.desk.conversation.settings
    chat.screen.desk.use(msgspec.structs.replace(settings, tools=names))


@pytest.mark.parametrize(
    ("keys", "outcome"),
    [(("enter",), "refused"), (("right", "enter"), "ran"), (("right", "right", "enter"), "ran")],
)
def test_a_tool_runs_only_after_it_was_allowed(
    monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...], outcome: str
) -> None:
    searched: list[str] = []

    async def search(query: str) -> tuple[Found, ...]:
        searched.append(query)
        return (Found(title="Sun", href="https://example.org", body="all day"),)

    monkeypatch.setattr(tools, "search_web", search)

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        await chat.say(pilot, "Weather?")
        box = chat.screen.query_one(ConsentBox)
        await until(pilot, lambda: box.is_asking and box.has_focus_within)
        assert "The model wants to use Web search" in chat.shown
        assert "weather" in chat.shown
        assert searched == []
        await pilot.press(*keys)
        await chat.answered(pilot)
        told = chat.messages[2]
        assert isinstance(told, ToolMessage)
        assert told.outcome == outcome
        assert searched == (["weather"] if outcome == "ran" else [])
        assert chat.messages[-1].text == "It shines."
        assert chat.screen.query_one(ToolView)
        assert chat.screen.desk.allowed == ({"web_search"} if len(keys) == 3 else set())
        assert not box.display
        assert isinstance(chat.app.focused, Prompt)

    with scripted(SEARCH, answer("It shines.")) as (app, _):
        chat(app, steps)


def test_what_is_being_typed_is_never_taken_for_consent() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        await chat.say(pilot, "Weather?")
        await pilot.press("a")
        await until(pilot, lambda: chat.screen.query_one(ConsentBox).is_asking)
        await pilot.press(*"yes", "enter")
        assert chat.text == "ayes"
        assert chat.screen.query_one(ConsentBox).is_asking
        await pilot.press("escape")
        await chat.answered(pilot)
        assert chat.messages[-1].outcome == "refused"
        assert not chat.screen.query_one(ConsentBox).is_asking

    def slowly(request: Any) -> Any:
        yield 0.5
        yield from SEARCH(request)

    with scripted(slowly, answer("unheard")) as (app, engine):
        chat(app, steps)
    assert len(engine.requests) == 1


def test_code_is_not_offered_where_no_sandbox_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.shutil, "which", lambda name: None)
    monkeypatch.setattr(probe.sys, "platform", "linux")

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await pilot.press("ctrl+s")
        for name in ("web_search", "python", "terminal"):
            chat.app.screen.query_one(f"#tool-{name}", Checkbox).value = True
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "Web search" in chat.line)
        assert chat.screen.desk.conversation.settings.tools == ("web_search",)
        (note,) = [note.message for note in chat.app._notifications if "stay off" in note.message]
        assert "apt install bubblewrap" in note

    with scripted() as (app, _):
        chat(app, steps)


def test_a_pasted_picture_is_shown_and_sent_to_a_model_that_sees(tmp_path: Path) -> None:
    PILImage.new("RGB", (40, 30), "blue").save(tmp_path / "sky.png")

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        chat.screen.query_one(Prompt).post_message(events.Paste(str(tmp_path / "sky.png")))
        await until(pilot, lambda: "sky.png 40×30" in chat.shown)
        assert chat.text == ""
        await chat.ask(pilot, "What is it?")
        (image,) = [part for part in engine.requests[0].messages[0].parts if isinstance(part, Image)]
        assert image.data == (tmp_path / "sky.png").read_bytes()
        assert chat.screen.desk.pictures == ()
        assert "sky.png 40×30" in chat.shown

    with scripted(status=seeing()) as (app, engine):
        chat(app, steps, WIDE)


def test_a_model_that_sees_nothing_is_said_before_sending(tmp_path: Path) -> None:
    PILImage.new("RGB", (4, 3)).save(tmp_path / "a.png")

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await pilot.press("ctrl+b")
        await until(pilot, lambda: isinstance(chat.app.screen, LineForm))
        chat.app.screen.query_one(Input).value = str(tmp_path / "none.png")
        await pilot.press("enter")
        await until(pilot, lambda: any("cannot read" in note.message for note in chat.app._notifications))
        assert chat.screen.desk.pictures == ()
        chat.screen.attach_file(str(tmp_path / "a.png"))
        await until(pilot, lambda: "org/tiny sees no images" in chat.line)
        await chat.say(pilot, "Look")
        await pilot.pause(0.1)
        assert chat.text == "Look"
        assert engine.requests == []
        chat.screen.query_one(Composer).text = ""
        await pilot.press("backspace")
        await until(pilot, lambda: "sees no images" not in chat.line)

    with scripted() as (app, engine):
        chat(app, steps)


def test_conversations_are_opened_renamed_exported_and_deleted(
    store: ConversationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "The first")
        await pilot.press("ctrl+n")
        await until(pilot, lambda: chat.messages == ())
        await chat.ask(pilot, "The second")
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(chat.app.screen, ConversationList))
        assert chat.shown.index("The second") < chat.shown.index("The first")
        await pilot.press("down", "r")
        await pilot.pause(0.1)
        await pilot.press("ctrl+a", "ctrl+k", *"Renamed", "enter")
        await until(pilot, lambda: isinstance(chat.app.screen, ConversationList) and "Renamed" in chat.shown)
        await pilot.press("down", "enter")
        await until(pilot, lambda: chat.messages[:1] == (UserMessage(text="The first"),))
        await until(pilot, lambda: len(chat.screen.query(QuestionView)) == 1)
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(chat.app.screen, ConversationList))
        await pilot.press("down", "e")
        await pilot.pause(0.1)
        await pilot.press("enter")
        await until(pilot, lambda: len(list(tmp_path.glob("*.md"))) == 1)
        await until(pilot, lambda: isinstance(chat.app.screen, ConversationList))
        await pilot.press("d")
        await pilot.pause(0.1)
        await pilot.press("y")
        await until(pilot, lambda: len(store.entries()) == 1)

    with scripted() as (app, _):
        chat(app, steps)
    assert [entry.name for entry in store.entries()] == ["Renamed"]
    assert next(tmp_path.glob("*.md")).read_text().startswith("# Renamed\n")


def test_the_demo_answers_and_keeps_nothing(store: ConversationStore) -> None:
    kept: list[Path] = []

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "Why is the sky blue?")
        assert "tok/s" in chat.shown
        kept.append(chat.screen.desk.store.folder)
        assert kept[0].is_dir()

    chat(demo_lab("chat"), steps)
    assert not kept[0].exists()
    assert not store.folder.exists()


def test_an_answer_goes_on_while_another_screen_is_looked_at() -> None:
    wait = Until()

    def halting(request: Any) -> Any:
        yield wait
        yield from answer("Here I am")(request)

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.say(pilot, "Are you there?")
        await pilot.press("f1")
        assert chat.app.current_mode == "monitor"
        wait.go.set()
        await chat.answered(pilot)
        assert chat.messages[-1].text == "Here I am"
        await pilot.press("f3")
        await until(pilot, lambda: "Here I am" in chat.shown)

    with scripted(halting) as (app, _):
        chat(app, steps)


def test_a_call_unfolds_and_its_result_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    async def search(query: str) -> tuple[Found, ...]:
        return (Found(title="[bold]Sun[/bold]", href="https://example.org", body="all day"),)

    monkeypatch.setattr(tools, "search_web", search)

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        chat.screen.desk.allowed.add("web_search")
        await chat.ask(pilot, "Weather?")
        assert "web_search ✓ ran: [bold]Sun[/bold]" in chat.shown
        folded = chat.screen.query_one(ToolView).query_one(Collapsible)
        folded.collapsed = False
        await until(pilot, lambda: "https://example.org" in chat.shown)

    with scripted(SEARCH, answer("It shines.")) as (app, _):
        chat(app, steps, WIDE)


def listed(chat: Chat) -> int:
    """Conversations in the dialog."""
    return sum(each.option_count for each in chat.app.screen.query(OptionList))


def test_drafts_survive_other_screens_conversations_and_the_end(store: ConversationStore) -> None:
    async def write(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "Asked")
        await pilot.press(*"one", "f1")
        await until(pilot, lambda: store.entries()[0].has_draft)
        await pilot.press("f3", "ctrl+n")
        await until(pilot, lambda: chat.messages == ())
        assert chat.text == ""
        await pilot.press(*"two", "ctrl+o")
        await until(pilot, lambda: listed(chat) == 2)
        assert "draft  two  0 asked" in chat.shown
        await pilot.press("slash", *"asked")
        await until(pilot, lambda: listed(chat) == 1)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: chat.text == "one")
        assert chat.messages[0].text == "Asked"
        await pilot.press(*"!")

    async def read(pilot: Pilot[Any], chat: Chat) -> None:
        assert (chat.text, chat.messages[0].text) == ("one!", "Asked")
        await chat.say(pilot, chat.text)
        await chat.answered(pilot)

    with scripted() as (app, _):
        chat(app, write)
        chat(lab_at(app.client.url, "chat"), read)
    assert [(entry.name, entry.has_draft) for entry in store.entries()] == [("Asked", False), ("two", True)]


def test_an_earlier_answer_is_a_key_away() -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "First")
        await pilot.press("n", "ctrl+r")
        await chat.answered(pilot)
        assert chat.text == "n"  # asking again is no reason to lose what is being written
        await until(pilot, lambda: "one of 2 answers (F8)" in chat.shown)
        await pilot.press("f8")
        await until(pilot, lambda: "Uno" in chat.shown and "Due" not in chat.shown)
        await pilot.press("f8")
        await until(pilot, lambda: "Due" in chat.shown and "Uno" not in chat.shown)

    with scripted(answer("Uno"), answer("Due")) as (app, _):
        chat(app, steps)


def test_an_answer_of_thousands_of_lines_is_whole_and_keys_stay_quick() -> None:
    text = "\n".join(f"- line {number} \x1b]0;title\x07" for number in range(3000))

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "Much?")
        await until(pilot, lambda: "line 2999" in chat.shown)
        assert "\x1b" not in chat.shown
        assert chat.messages[-1].text == text
        view = chat.screen.query_one(AnswerView)
        assert len(view.query("*")) < 1000  # a widget for each line would be thousands, and minutes
        begun = time.monotonic()
        await pilot.press("a")
        assert time.monotonic() - begun < 2
        assert chat.text == "a"

    with scripted(answer(text)) as (app, _):
        chat(app, steps)


def test_a_link_says_where_it_leads_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        monkeypatch.setattr(chat.app, "open_url", lambda url, **_: opened.append(url))
        await chat.ask(pilot, "Link?")
        markdown = chat.screen.query_one(AnswerView).query_one(Markdown)
        for href in ("file:///etc/passwd", "http://[", "javascript:x"):
            markdown.post_message(Markdown.LinkClicked(markdown, href))
            await pilot.pause()
        assert opened == []
        markdown.post_message(Markdown.LinkClicked(markdown, "https://evil.example/?q=1"))
        await until(pilot, lambda: "Open https://evil.example/?q=1 ?" in chat.shown)
        await pilot.press("y")
        await until(pilot, lambda: opened == ["https://evil.example/?q=1"])

    with scripted(answer("[bank](https://evil.example/?q=1)")) as (app, _):
        chat(app, steps)


def test_consent_shows_what_cannot_be_seen_and_takes_no_click_meant_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        await chat.say(pilot, "Weather?")
        box = chat.screen.query_one(ConsentBox)
        await until(pilot, lambda: box.is_asking)
        assert "a\\u202eb\\u200b" in chat.shown
        assert "(11 lines; scroll to read all)" in str(box.query_one("#question", Static).render())
        assert "Allow once" in chat.shown
        box.query_one("#once", Button).press()
        await pilot.pause()
        assert box.is_asking
        box.query_one("#refuse", Button).press()
        await chat.answered(pilot)
        assert chat.messages[2].outcome == "refused"

    monkeypatch.setattr(consent_box, "_HASTY_S", 60.0)
    query = msgspec.json.encode({"query": "a\u202eb\u200b" + "\n" * 10 + "c"}).decode()
    with scripted(answer(*call("web_search", query), reason="tool_calls"), answer("No.")) as (app, _):
        chat(app, steps)


def test_leaving_while_a_tool_asks_keeps_a_whole_conversation(store: ConversationStore) -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        await chat.say(pilot, "Weather?")
        await until(pilot, lambda: chat.screen.query_one(ConsentBox).is_asking)

    with scripted(SEARCH) as (app, _):
        chat(app, steps)
    kept = store.open(store.entries()[0].id)
    assert settled(kept) is kept
    assert [type(message).__name__ for message in kept.messages] == [
        "UserMessage",
        "AssistantMessage",
        "ToolMessage",
    ]
    assert kept.messages[2].outcome == "refused"  # type: ignore[union-attr]


def test_what_goes_wrong_unforeseen_ends_the_answer_and_not_the_dashboard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def search(query: str) -> tuple[Found, ...]:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(tools, "search_web", search)

    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        offered(chat, "web_search")
        chat.screen.desk.allowed.add("web_search")
        await chat.ask(pilot, "Weather?")
        await until(pilot, lambda: "RuntimeError: nobody thought of this" in chat.shown)
        assert chat.messages[-1].outcome == "refused"

    with scripted(SEARCH) as (app, _):
        chat(app, steps)


def test_two_dashboards_on_one_conversation_part(store: ConversationStore) -> None:
    async def steps(pilot: Pilot[Any], chat: Chat) -> None:
        await chat.ask(pilot, "Here")
        other = ConversationStore(store.folder)
        other.save(other.open(store.entries()[0].id).with_messages(UserMessage(text="There")))
        await chat.ask(pilot, "Here again")
        await until(pilot, lambda: "goes on as a copy" in chat.shown)
        assert [message.text for message in chat.messages] == ["Here", "one", "Here again", "two"]

    with scripted(answer("one"), answer("two")) as (app, _):
        chat(app, steps)
    assert {entry.name for entry in store.entries()} == {"Here", "Here (copy)"}


@pytest.mark.skipif(version("textual") != "8.2.8", reason="the pictures were made with Textual 8.2.8")
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_screen_looks_as_before(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    """A recorded conversation whose figures are fixed."""

    async def opened(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, LabApp)
        await until(pilot, lambda: app.status is not None and isinstance(app.focused, Prompt))
        chat = Chat(app)
        stats = AnswerStats(
            first_token_s=0.42, tokens_per_s=31.5, prompt_tokens=85, cached_tokens=64, completion_tokens=40
        )
        use = ToolUse(id="c1", name="python", arguments='{"code": "print(2**10)"}')
        settings = ChatSettings(model="SmolLM2-135M-Instruct", adapter="rhymes")
        conversation = chat.screen.desk.conversation.with_messages(
            UserMessage(text="What is 2 to the power of 10?"),
            AssistantMessage(
                reasoning="I compute it.", tool_calls=(use,), end="tool_calls", settings=settings
            ),
            ToolMessage(call_id="c1", name="python", text="exit code 0\nstdout:\n1024", outcome="ran"),
            AssistantMessage(
                text="It is **1024**:\n\n```python\nprint(2**10)  # 1024\n```",
                end="stop",
                settings=settings,
                stats=stats,
            ),
        )
        chat.screen.desk.open(conversation)
        await chat.screen.draw_all()
        chat.screen.query_one(Prompt).cursor_blink = False
        # The bar above shows the recording, which stands still after its first moment.
        await pilot.pause(0.5)

    app = demo_lab("chat", until=1)
    assert snap_compare(app, terminal_size=size, run_before=opened)
