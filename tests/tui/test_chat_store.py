"""Conversations on disk, as requests, as Markdown; pictures beside them."""

import base64
import io
import os
import stat
import sys
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_tui.chat.conversation import (
    AnswerStats,
    AssistantMessage,
    ChatSettings,
    Conversation,
    Draft,
    ToolMessage,
    ToolUse,
    UserMessage,
    as_markdown,
)
from mlx_optiq_tui.chat.long_text import split_after
from mlx_optiq_tui.chat.pictures import pasted_path, read_picture
from mlx_optiq_tui.chat.plain import plain, plainest
from mlx_optiq_tui.chat.store import ConversationChanged, ConversationStore, data_folder
from mlx_optiq_tui.chat.wire import request_body

SETTINGS = ChatSettings(
    model="tiny", adapter="sql", temperature=0.5, max_tokens=20, seed=3, effort="low", system="Be terse."
)
CALL = ToolUse(id="call1", name="python", arguments='{"code": "print(1)"}')


@pytest.fixture
def store(tmp_path: Path) -> ConversationStore:
    return ConversationStore(tmp_path / "conversations")


def talk(store: ConversationStore) -> Conversation:
    """A conversation with everything in it."""
    conversation = store.new(SETTINGS)
    image = store.keep_image(conversation.id, b"picture", "image/png", "cat.png")
    return conversation.with_messages(
        UserMessage(text="What is\n this?", images=(image,)),
        AssistantMessage(reasoning="Hm.\n\nI run it.", tool_calls=(CALL,), end="tool_calls"),
        ToolMessage(call_id="call1", name="python", text="has ``` in it", outcome="ran"),
        AssistantMessage(
            text="A **cat**.", end="stop", settings=SETTINGS, stats=AnswerStats(first_token_s=0.5)
        ),
    )


def test_what_is_saved_is_opened_again(store: ConversationStore) -> None:
    conversation = store.save(talk(store))
    assert store.open(conversation.id) == conversation
    assert conversation.name == "What is this?"
    (entry,) = store.entries()
    assert (entry.id, entry.name, entry.turns, entry.problem) == (conversation.id, "What is this?", 1, "")
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in store.folder.iterdir()) == [
        conversation.id,
        f"{conversation.id}.json",
    ]


def test_the_one_changed_last_comes_first_and_broken_ones_are_told(store: ConversationStore) -> None:
    first, second = store.save(store.new()), store.save(store.new())
    store.save(msgspec.structs.replace(first, title="Renamed"))
    assert [entry.name for entry in store.entries()] == ["Renamed", "New conversation"]
    (store.folder / f"{second.id}.json").write_text('{"format_version": 9}')
    problem = next(entry.problem for entry in store.entries() if entry.id == second.id)
    assert "format version 9" in problem
    with pytest.raises(UsageError, match="format version 9"):
        store.open(second.id)


def test_deleting_takes_pictures_and_workspace_along(store: ConversationStore, tmp_path: Path) -> None:
    conversation = store.save(talk(store))
    workspace = store.workspace(conversation.id)
    workspace.mkdir()
    (tmp_path / "outside").mkdir()
    (workspace / "link").symlink_to(tmp_path / "outside")
    store.delete(conversation.id)
    assert list(store.folder.iterdir()) == []
    assert (tmp_path / "outside").is_dir()


@pytest.mark.parametrize("id", ["", "../x", "20260101-000000-zzzzzz", "/etc/passwd"])
def test_no_id_leads_out_of_the_folder(store: ConversationStore, id: str) -> None:
    with pytest.raises(UsageError, match="names no conversation"):
        store.delete(id)


def test_markdown_has_everything_and_pictures_beside_it(store: ConversationStore, tmp_path: Path) -> None:
    conversation = talk(store)
    file = store.export(conversation, tmp_path / "talk.md")
    (picture,) = (tmp_path / "talk-images").iterdir()
    assert picture.read_bytes() == b"picture"
    assert file.read_text() == (
        "# What is this?\n\n## System\n\nBe terse.\n\n"
        f"## You\n\n![cat.png](talk-images/{picture.name})\n\nWhat is\n this?\n\n"
        "## Model\n\n> Hm.\n>\n> I run it.\n\n"
        '### Call python\n\n```json\n{"code": "print(1)"}\n```\n\n'
        "### Tool python: ran\n\n````\nhas ``` in it\n````\n\n"
        "## Model · tiny@sql\n\nA **cat**.\n"
    )
    with pytest.raises(UsageError, match="already exists"):
        store.export(conversation, file)


def test_a_request_says_what_was_set_and_nothing_else(store: ConversationStore) -> None:
    conversation = talk(store)
    tools = [{"type": "function", "function": {"name": "python"}}]
    body = request_body(conversation, lambda image: b"picture", tools, may_call=False)
    picture = base64.b64encode(b"picture").decode()
    assert body == {
        "messages": [
            {"role": "system", "content": "Be terse."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                    {"type": "text", "text": "What is\n this?"},
                ],
            },
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "Hm.\n\nI run it.",
                "tool_calls": [
                    {
                        "id": "call1",
                        "type": "function",
                        "function": {"name": "python", "arguments": '{"code": "print(1)"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call1", "content": "has ``` in it"},
            {"role": "assistant", "content": "A **cat**."},
        ],
        "model": "tiny",
        "adapter": "sql",
        "temperature": 0.5,
        "max_tokens": 20,
        "seed": 3,
        "reasoning_effort": "low",
        "tools": tools,
        "tool_choice": "none",
        "prompt_cache_key": conversation.id,
    }
    plain = store.new().with_messages(UserMessage(text="Hello"))
    assert request_body(plain, lambda image: b"") == {
        "messages": [{"role": "user", "content": "Hello"}],
        "prompt_cache_key": plain.id,
    }


def test_taking_back_the_last_question_takes_all_that_followed(store: ConversationStore) -> None:
    conversation = talk(store).with_messages(UserMessage(text="And?"), AssistantMessage(text="No more."))
    before, asked = conversation.before_last_question()
    assert asked == UserMessage(text="And?")
    assert len(before.messages) == 4
    empty, nothing = store.new().before_last_question()
    assert nothing is None
    assert empty.messages == ()


def test_pictures_are_read_as_the_server_takes_them(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.png")
    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.bmp")
    png, bmp = read_picture(tmp_path / "a.png"), read_picture(tmp_path / "a.bmp")
    assert (png.media_type, png.width, png.height, png.label) == ("image/png", 4, 3, "a.png")
    assert png.data == (tmp_path / "a.png").read_bytes()
    assert bmp.media_type == "image/png"
    assert bmp.data.startswith(b"\x89PNG")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"text\.png is no picture"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(UsageError, match="No such file"):
        read_picture(tmp_path / "none.png")


def test_a_pasted_path_is_recognized_as_terminals_write_it(tmp_path: Path) -> None:
    path = tmp_path / "my cat.PNG"
    path.write_bytes(b"x")
    escaped = str(path).replace(" ", "\\ ")
    for text in (str(path), f"'{path}' ", escaped, f"file://{str(path).replace(' ', '%20')}"):
        assert pasted_path(text) == path
    for text in (
        "",
        "hello",
        "it's",
        str(tmp_path),
        str(tmp_path / "none.png"),
        f"{path}\n{path}",
        "/x" * 9000,
    ):
        assert pasted_path(text) is None


def test_conversations_lie_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_folder() == Path("/data/mlx-optiq-ext/conversations")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert data_folder() == Path.home() / ".local/share/mlx-optiq-ext/conversations"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_folder() == Path.home() / "Library/Application Support/mlx-optiq-ext/conversations"


def test_a_draft_is_kept_with_its_conversation_and_goes_with_an_empty_one(store: ConversationStore) -> None:
    assert store.last_draft() is None
    asked = store.save(talk(store))
    draft = Draft(text="and a dog?", images=asked.messages[0].images, is_editing=True)  # type: ignore[union-attr]
    store.keep_draft(asked, draft)
    new = store.new()
    store.keep_draft(new, Draft(text="something else"))
    again = ConversationStore(store.folder)
    assert again.last_draft() == new
    assert (again.draft(asked.id), again.draft(new.id).text) == (draft, "something else")
    listed = {entry.id: (entry.name, entry.has_draft) for entry in again.entries()}
    assert listed == {asked.id: ("What is this?", True), new.id: ("something else", True)}
    again.keep_draft(new, Draft())
    again.keep_draft(asked, Draft())
    assert [(entry.id, entry.has_draft) for entry in again.entries()] == [(asked.id, False)]
    (store.folder / asked.id / "draft.json").write_text("{")
    assert again.draft(asked.id) == Draft()


def test_conversations_are_found_by_words_of_name_text_and_draft(store: ConversationStore) -> None:
    cat, other = store.save(talk(store)), store.save(store.new())
    store.rename(other, "Über Hunde")
    store.keep_draft(other, Draft(text="Dackel"))
    assert [entry.id for entry in store.entries("CAT this")] == [cat.id]
    assert [entry.id for entry in store.entries("über dackel")] == [other.id]
    assert store.entries("cat dackel") == []


def test_two_dashboards_lose_nothing_of_each_other(store: ConversationStore) -> None:
    mine = store.save(talk(store))
    other = ConversationStore(store.folder)
    other.save(other.open(mine.id).with_messages(UserMessage(text="there")))
    with pytest.raises(ConversationChanged, match="by another dashboard"):
        store.save(mine.with_messages(UserMessage(text="here")))
    copy = store.fork(mine)
    assert copy.name == "What is this? (copy)"
    assert store.image_path(copy.id, copy.messages[0].images[0]).read_bytes() == b"picture"  # type: ignore[union-attr]
    assert store.open(mine.id).messages[-1] == UserMessage(text="there")
    store.save(copy)


def test_folders_of_others_are_closed_and_files_of_others_refused(store: ConversationStore) -> None:
    store.folder.mkdir(mode=0o755)
    conversation = store.save(store.new())
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    other = store.new()
    (store.folder / f"{other.id}.json").write_bytes((store.folder / f"{conversation.id}.json").read_bytes())
    with pytest.raises(UsageError, match="another conversation's file"):
        store.open(other.id)


def test_an_earlier_answer_comes_round(store: ConversationStore) -> None:
    first = talk(store)
    question = UserMessage(text="Edited?")
    second = first.asking_instead(question)
    assert (second.messages, second.others) == ((question,), (first.messages,))
    assert second.asking_instead(question).others == (
        first.messages,
    )  # nothing was answered, nothing is kept
    third = second.with_messages(AssistantMessage(text="Yes.")).other_answer()
    assert third.messages == first.messages
    assert third.other_answer().messages[0] == question
    assert store.open(store.save(third).id).others == third.others


def test_text_of_others_cannot_command_a_terminal() -> None:
    hostile = "a\x1b]52;c;eA==\x07b\x9b2Jc\u202ed\r\n\te\x7f\u2028"
    assert plain(hostile) == "a␛]52;c;eA==␇b\\x9b2Jc\\u202ed\n\te␡\\u2028"
    assert plain("Grüße 👩‍🔬 日本") == "Grüße 👩‍🔬 日本"
    assert plainest("rm\u200b -r\u00a0x \U000e0041\n") == "rm\\u200b -r\\xa0x \\U000e0041\n"
    said = Conversation(id="x", created=0, changed=0, messages=(AssistantMessage(text=hostile),))
    assert "\x1b" not in as_markdown(said)


def test_text_is_split_after_lines_or_characters() -> None:
    assert split_after("a\nb\nc", 2, 100) == ("a\nb\n", "c")
    assert split_after("a\nb", 2, 100) == ("a\nb", "")
    assert split_after("x" * 10, 2, 4) == ("xxxx", "xxxxxx")
    assert split_after("a\n" + "x" * 10, 5, 4) == ("a\n", "x" * 10)
    assert split_after("", 2, 4) == ("", "")


def test_pictures_that_would_harm_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is no file"):
            read_picture(path)
    Image.new("1", (10_000, 6_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UsageError, match="10000×6000 pixels, more than 50 million"):
        read_picture(tmp_path / "bomb.png")
    (tmp_path / "large.png").write_bytes(bytes(21 << 20))
    with pytest.raises(UsageError, match="larger than 20 MiB"):
        read_picture(tmp_path / "large.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UsageError, match="save it as JPEG or PNG"):
        read_picture(tmp_path / "phone.heic")


def test_a_picture_stands_upright_and_only_its_first_frame_counts(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=turned)
    upright = read_picture(tmp_path / "turned.jpg")
    assert (upright.width, upright.height, upright.media_type) == (20, 40, "image/png")
    assert upright.preview == b""
    Image.new("RGB", (1300, 650)).save(tmp_path / "large.png")
    preview = Image.open(io.BytesIO(read_picture(tmp_path / "large.png").preview))
    assert preview.size == (640, 320)
    frames = [Image.new("P", (8, 8), color) for color in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "moving.gif").media_type == "image/gif"
