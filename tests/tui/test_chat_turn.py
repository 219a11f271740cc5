"""Answers and tool calls against the real HTTP server over a scripted engine."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support_engine import FakeEngine, Script, answer, call
from support_http import live

from mlx_optiq_ext.errors import EngineError, RequestError, ResourceError
from mlx_optiq_ext.types.chat import Generation, ToolCall, ToolResult
from mlx_optiq_tui.chat import tools
from mlx_optiq_tui.chat.conversation import (
    AssistantMessage,
    ChatSettings,
    Conversation,
    ToolMessage,
    ToolUse,
    UserMessage,
)
from mlx_optiq_tui.chat.sandbox.probe import NoSandbox, Sandbox
from mlx_optiq_tui.chat.tools import Found, ToolBox, shown_arguments
from mlx_optiq_tui.chat.turn import MAX_CALLS, MAX_ROUNDS, Answering, Decision, Turn, settled
from mlx_optiq_tui.chat_stream import (
    ChatDelta,
    ChatUsage,
    ToolCallPart,
    chat_deltas,
    server_events,
    text_lines,
)
from mlx_optiq_tui.client import ServerClient

QUERY = '{"query": "weather"}'
CALL = ToolUse(id="c1", name="python", arguments='{"code": "print(1)"}')


async def found(query: str) -> tuple[Found, ...]:
    return (Found(title="Weather", href="https://example.org", body=f"about {query}"),)


async def no_sandbox(workspace: Path) -> Sandbox:
    raise NoSandbox("bubblewrap is not installed; install it")


class Person:
    """Decides as told, in turn."""

    def __init__(self, *decisions: Decision) -> None:
        self.decisions = list(decisions)
        self.asked: list[ToolUse] = []

    async def __call__(self, call: ToolUse) -> Decision:
        self.asked.append(call)
        return self.decisions.pop(0)


def asked(*names: str) -> Conversation:
    """A conversation with a question and these tools."""
    settings = ChatSettings(tools=names)
    return Conversation(
        id="20260101-000000-abcdef",
        created=0.0,
        changed=0.0,
        settings=settings,
        messages=(UserMessage(text="How is the weather?"),),
    )


def box() -> ToolBox:
    return ToolBox(Path("/nowhere"), search=found, open_sandbox=no_sandbox)


def finish(person: Person, conversation: Conversation, *scripts: Script) -> tuple[Turn, list[Generation]]:
    """Run a whole turn; the turn and what the engine was asked."""
    engine = FakeEngine(*scripts)

    async def run(url: str) -> Turn:
        client = ServerClient(url)
        turn = Turn(client, conversation, box(), person, lambda image: b"")
        try:
            async for _ in turn.run():
                pass
        finally:
            await client.close()
        return turn

    with live(engine) as url:
        return asyncio.run(run(url)), engine.requests


def searching(*arguments: str) -> Script:
    return answer(*call("web_search", *arguments), reason="tool_calls")


def test_an_answer_keeps_text_thoughts_and_cost() -> None:
    turn, _ = finish(Person(), asked(), answer("Fine", ".", reasoning="I look out."))
    (message,) = turn.conversation.messages[1:]
    assert isinstance(message, AssistantMessage)
    assert (message.text, message.reasoning, message.end) == ("Fine.", "I look out.", "stop")
    assert (message.stats.prompt_tokens, message.stats.cached_tokens) == (100, 64)
    assert message.stats.completion_tokens == 12
    assert message.stats.first_token_s is not None
    assert turn.answering is None


def test_an_allowed_call_runs_and_the_model_goes_on_with_its_result() -> None:
    person = Person("once", "once")
    turn, requests = finish(
        person,
        asked("web_search"),
        searching('{"query": ', '"weather"}'),
        searching(QUERY),
        answer("Sunny."),
    )
    kinds = [type(message).__name__ for message in turn.conversation.messages]
    assert kinds == ["UserMessage", *["AssistantMessage", "ToolMessage"] * 2, "AssistantMessage"]
    assert [use.arguments for use in person.asked] == [QUERY, QUERY]  # once is once
    told = turn.conversation.messages[2]
    assert isinstance(told, ToolMessage)
    assert (told.outcome, told.text) == ("ran", "Weather\nhttps://example.org\nabout weather")
    called, result = requests[1].messages[-2:]
    assert [part.name for part in called.parts if isinstance(part, ToolCall)] == ["web_search"]
    assert [part.id for part in result.parts if isinstance(part, ToolResult)] == [told.call_id]
    assert [tool.name for tool in requests[0].tools] == ["web_search"]


def test_allowed_for_the_conversation_is_not_asked_again() -> None:
    person = Person("conversation")
    turn, _ = finish(person, asked("web_search"), searching(QUERY), searching(QUERY), answer("Sunny."))
    assert len(person.asked) == 1
    assert turn.allowed == {"web_search"}


def test_a_refusal_is_told_to_the_model_and_nothing_runs() -> None:
    turn, requests = finish(Person("refuse"), asked("web_search"), searching(QUERY), answer("Then not."))
    told = turn.conversation.messages[2]
    assert isinstance(told, ToolMessage)
    assert told.outcome == "refused"
    assert told.text.startswith("The user refused this call")
    (result,) = requests[1].messages[-1].parts
    assert isinstance(result, ToolResult)


def test_a_model_that_only_calls_has_to_answer_in_the_end() -> None:
    person = Person("conversation")
    scripts = [searching(QUERY)] * MAX_ROUNDS
    _, requests = finish(person, asked("web_search"), *scripts, answer("Enough."))
    assert [request.tool_choice.mode for request in requests] == ["auto"] * MAX_ROUNDS + ["none"]


def test_a_tool_that_was_not_offered_is_not_run() -> None:
    person = Person()
    turn, _ = finish(person, asked("python"), searching(QUERY), answer("Well."))
    told = turn.conversation.messages[2]
    assert isinstance(told, ToolMessage)
    assert (told.outcome, told.text) == ("failed", "error: there is no tool 'web_search'")
    assert person.asked == []


def test_without_a_sandbox_code_is_refused_with_the_reason() -> None:
    script = answer(*call("python", '{"code": "print(1)"}'), reason="tool_calls")
    turn, _ = finish(Person("once"), asked("python"), script, answer("I cannot."))
    told = turn.conversation.messages[2]
    assert isinstance(told, ToolMessage)
    assert (told.outcome, told.text) == ("failed", "error: bubblewrap is not installed; install it")


def test_python_and_terminal_share_the_workspace_of_the_conversation(tmp_path: Path) -> None:
    async def run() -> list[ToolMessage]:
        box = ToolBox(tmp_path / "workspace")
        try:
            await box.prepare()
        except NoSandbox as error:
            pytest.skip(str(error))
        code = "{\"code\": \"open('made.txt', 'w').write('kept'); print(6 * 7)\"}"
        line = '{"command": "cat made.txt; exit 3"}'
        uses = (
            ToolUse(id="a", name="python", arguments=code),
            ToolUse(id="b", name="terminal", arguments=line),
        )
        return [await box.run(use) for use in uses]

    python, terminal = asyncio.run(run())
    assert python.text == "exit code 0\nstdout:\n42\nfiles written: made.txt"
    assert terminal.text == "exit code 3\nstdout:\nkept"
    assert {python.outcome, terminal.outcome} == {"ran"}


class Breaking:
    """Streams something, then fails."""

    def __init__(self, *deltas: ChatDelta) -> None:
        self.deltas = deltas

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[ChatDelta, None]:
        for delta in self.deltas:
            yield delta
        raise RequestError("the server ran out of memory")


def broken(*deltas: ChatDelta) -> Turn:
    turn = Turn(Breaking(*deltas), asked("python"), box(), Person(), lambda image: b"")

    async def run() -> None:
        async for _ in turn.run():
            pass

    with pytest.raises(RequestError, match="out of memory"):
        asyncio.run(run())
    turn.cut(broke_off=True)
    return turn


def test_what_came_before_an_error_is_kept_and_half_a_call_is_not() -> None:
    half = ChatDelta(tool_calls=(ToolCallPart(index=0, id="c1", name="python", arguments='{"co'),))
    turn = broken(ChatDelta(text="It is "), half)
    last = turn.conversation.messages[-1]
    assert isinstance(last, AssistantMessage)
    assert (last.text, last.tool_calls, last.end) == ("It is ", (), "")
    assert len(broken().conversation.messages) == 1  # nothing came, nothing is kept


def test_calls_that_were_not_done_get_an_answer_when_the_person_stops() -> None:
    conversation = asked("python").with_messages(AssistantMessage(tool_calls=(CALL,), end="tool_calls"))
    turn = Turn(Breaking(), conversation, box(), Person(), lambda image: b"")
    turn.cut()
    last = turn.conversation.messages[-1]
    assert isinstance(last, ToolMessage)
    assert (last.call_id, last.outcome) == ("c1", "refused")
    assert settled(conversation) == turn.conversation  # so it is where a dashboard was killed


def test_speed_counts_tokens_after_the_first() -> None:
    times = iter([10.0, 10.5, 11.0, 12.5])
    answering = Answering(ChatSettings(), lambda: next(times))
    for text in ("a", "b", "c"):
        answering.add(ChatDelta(text=text))
    answering.add(ChatDelta(usage=ChatUsage(prompt_tokens=5, completion_tokens=9)))
    stats = answering.message().stats
    assert (stats.first_token_s, stats.tokens_per_s) == (0.5, 4.0)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (ToolUse(id="c", name="rm", arguments="{}"), "there is no tool 'rm'; there are web_search, python"),
        (ToolUse(id="c", name="python", arguments='{"code"'), "the arguments of python are no JSON"),
        (
            ToolUse(id="c", name="python", arguments='{"code": 3}'),
            "python takes one text, 'code'; it was given",
        ),
    ],
)
def test_wrong_calls_are_explained_to_the_model(use: ToolUse, said: str) -> None:
    told = asyncio.run(box().run(use))
    assert told.outcome == "failed"
    assert told.text.startswith(f"error: {said}")
    assert shown_arguments(use) == use.arguments


def test_a_failed_search_is_told() -> None:
    async def failing(query: str) -> tuple[Found, ...]:
        raise ResourceError("the web search failed: no connection")

    told = asyncio.run(
        ToolBox(Path("/nowhere"), search=failing).run(ToolUse(id="c", name="web_search", arguments=QUERY))
    )
    assert (told.outcome, told.text) == ("failed", "error: the web search failed: no connection")


def test_the_web_search_asks_ddgs_and_tells_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddgs.ddgs import DDGS
    from ddgs.exceptions import DDGSException

    def text(self: object, query: str, max_results: int) -> list[dict[str, str]]:
        if query == "nothing":
            raise DDGSException("No results found.")
        return [{"title": query, "href": "https://example.org", "body": str(max_results)}]

    monkeypatch.setattr(DDGS, "text", text)
    assert asyncio.run(tools.search_web("cats")) == (
        Found(title="cats", href="https://example.org", body="6"),
    )
    with pytest.raises(ResourceError, match="No results found"):
        asyncio.run(tools.search_web("nothing"))


async def chunks(*parts: bytes) -> AsyncGenerator[bytes, None]:
    for part in parts:
        yield part


def deltas_of(*parts: bytes) -> list[ChatDelta]:
    async def read() -> list[ChatDelta]:
        return [each async for each in chat_deltas(server_events(text_lines(chunks(*parts))))]

    return asyncio.run(read())


def test_a_stream_has_lines_of_its_own_not_those_of_unicode() -> None:
    odd = "a\u2028b\u0085c\x0bd"
    data = (
        b'data: {"choices":[{"delta":{"content":"'
        + odd.encode().replace(b"\x0b", b"\\u000b")
        + b'"}}]}\r\n\r\n'
    )
    for cut in range(1, len(data)):
        read = deltas_of(data[:cut], data[cut:], b"data: [DONE]\n\n")
        assert [delta.text for delta in read] == [odd]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b'data: {"choices":[]}\n\n', "broke off"),
        (b"data: {\n\n", "no chat answer"),
        (b'data: {"choices":[{"delta":{"content":"\\ud800"}}]}\n\n', "no chat answer"),
        (b'data: {"choices": 3}\n\n', "no chat answer"),
    ],
)
def test_a_stream_that_is_cut_or_no_answer_is_told(sent: bytes, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        deltas_of(sent)


def test_calls_beyond_the_limits_are_not_done() -> None:
    calls = [
        part
        for number in range(MAX_CALLS + 2)
        for part in call("web_search", QUERY, id=f"c{number}", index=number)
    ]
    person = Person(*["once"] * MAX_CALLS)
    turn, _ = finish(person, asked("web_search"), answer(*calls, reason="tool_calls"), answer("Sunny."))
    told = [message for message in turn.conversation.messages if isinstance(message, ToolMessage)]
    assert [message.outcome for message in told] == ["ran"] * MAX_CALLS + ["failed"] * 2
    assert "not done" in told[-1].text


def test_text_that_is_no_text_can_be_kept_and_sent() -> None:
    async def odd(query: str) -> tuple[Found, ...]:
        return (Found(title="half \ud83d", href="https://example.org"),)

    tools = ToolBox(Path("/nowhere"), search=odd, open_sandbox=no_sandbox)
    told = asyncio.run(tools.run(ToolUse(id="c", name="web_search", arguments=QUERY)))
    assert msgspec.json.decode(msgspec.json.encode(told), type=ToolMessage) == told
    assert told.text.startswith("half \\ud83d")
