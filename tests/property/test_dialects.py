"""No body makes a dialect fail by itself, and what is said in one comes back in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clients.event_order import check_messages, check_responses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient
from support_engine import FakeEngine, answer
from support_http import client_of, events_of

from mlx_optiq_ext.serve.anthropic.from_events import MessageStream
from mlx_optiq_ext.serve.anthropic.schema import MessagesRequest
from mlx_optiq_ext.serve.anthropic.to_generation import to_generation as from_anthropic
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.responses.from_events import Drafting, ResponseStream
from mlx_optiq_ext.serve.responses.items import normalized
from mlx_optiq_ext.serve.responses.schema import Item, ResponsesRequest
from mlx_optiq_ext.serve.responses.to_generation import Conversation
from mlx_optiq_ext.serve.responses.to_generation import to_generation as from_responses
from mlx_optiq_ext.serve.responses.tools import ToolTable
from mlx_optiq_ext.serve.unseen import conceal, reveal
from mlx_optiq_ext.types.chat import Reasoning, Text, ToolCall
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)

RECORDINGS = Path(__file__).parents[1] / "clients" / "recordings"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.text(min_size=1, max_size=12)
ACCEPTED = Accepted(prompt_tokens=100, model="m")
FINISHED = Finished(reason="stop", usage=Usage(prompt_tokens=100, completion_tokens=12))


def bodies(path: str) -> list[dict[str, Any]]:
    files = sorted(RECORDINGS.glob("*.json"))
    exchanges = [each for file in files for each in json.loads(file.read_text(encoding="utf-8"))["requests"]]
    return [{**each["body"], "stream": False} for each in exchanges if each["path"].startswith(path)]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(body: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy in which one place holds something else."""
    if not place:
        return new
    copy = list(body) if isinstance(body, list) else dict(body)
    copy[place[0]] = changed(copy[place[0]], place[1:], new)
    return copy


@pytest.fixture(scope="module")
def client() -> Any:
    with client_of(FakeEngine(answer("ok"))) as inside:
        yield inside


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_body_is_answered_or_refused(
    client: TestClient[Litestar], path: str, data: st.DataObject
) -> None:
    body = data.draw(st.sampled_from(bodies(path)), label="body")
    place = data.draw(st.sampled_from(places(body)), label="place")
    body = changed(body, place, data.draw(JSON, label="new"))
    answered = client.post(path, json=body)
    if answered.status_code != 200:
        assert 400 <= answered.status_code < 500, answered.text
        assert answered.json()["error"]["message"]
    elif isinstance(body, dict) and body.get("stream"):
        assert events_of(answered.text)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), garbage=st.binary(max_size=6))
def test_a_broken_body_is_refused(client: TestClient[Litestar], path: str, cut: int, garbage: bytes) -> None:
    whole = json.dumps(bodies(path.removesuffix("/count_tokens"))[0]).encode()
    answered = client.post(path, content=whole[:cut] + garbage, headers={"content-type": "application/json"})
    assert answered.status_code == 400
    assert answered.json()["error"]["message"]


@given(st.text())
def test_concealed_thoughts_are_revealed(text: str) -> None:
    assert reveal(conceal(text)) == text


@given(st.text())
def test_foreign_words_reveal_nothing_and_break_nothing(word: str) -> None:
    assert isinstance(reveal("optiq1." + word), str)
    assert reveal("x" + word) == ""


Said = list[tuple[str, str]]
SAID = st.lists(st.tuples(st.sampled_from(["text", "reasoning", "call"]), WORDS), min_size=1, max_size=6)


def events(said: Said) -> list[Event]:
    """An answer that says these things, each delta one character."""
    told: list[Event] = []
    for index, (kind, words) in enumerate(said):
        if kind == "call":
            arguments = json.dumps({"a": words})
            told.append(ToolCallStart(index=index, id=f"call{index}", name="f"))
            told += [ToolCallDelta(index=index, arguments=each) for each in arguments]
            told.append(ToolCallEnd(index=index, id=f"call{index}", name="f", arguments=arguments))
        else:
            delta = TextDelta if kind == "text" else ReasoningDelta
            told += [delta(text=each) for each in words]
    return [*told, FINISHED]


def joined(said: Said) -> Said:
    """The same, where neighbours of one kind are one; calls stay apart."""
    result: Said = []
    for kind, words in said:
        if result and kind != "call" and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + words)
        else:
            result.append((kind, words))
    return result


def heard(parts: tuple[Any, ...]) -> Said:
    """What the parts of an assistant's turn say."""
    said: Said = []
    for part in parts:
        match part:
            case Text(text=text):
                said.append(("text", text))
            case Reasoning(text=text):
                said.append(("reasoning", text))
            case ToolCall(arguments=arguments):
                said.append(("call", arguments["a"]))
    return joined(said)


def streamed(stream: Any, said: Said, check: Callable[[Any], None]) -> None:
    """Feed all of it, and check the order of what was written."""
    # events_of splits on every line end of Unicode, as some clients do.
    written = stream.first(ACCEPTED) + b"".join(stream.feed(event, 0) for event in events(said))
    check(events_of(written.decode()))


@settings(deadline=None)
@given(SAID, st.booleans())
def test_an_anthropic_answer_comes_back_as_it_was_said(said: Said, omit: bool) -> None:
    stream = MessageStream(omit_thinking=omit)
    streamed(stream, said, check_messages)
    turn = {"role": "assistant", "content": stream.message()["content"]}
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "q"}, turn]}
    asked = from_anthropic(msgspec.convert(body, MessagesRequest), ImageReader())
    assert heard(asked.messages[1].parts) == joined(said)


@settings(deadline=None)
@given(SAID, st.booleans(), st.booleans())
def test_a_response_comes_back_as_it_was_said(said: Said, summarize: bool, seal: bool) -> None:
    stream = ResponseStream(Drafting(document={"id": "resp"}, summarize=summarize, seal=seal))
    streamed(stream, said, check_responses)
    output = json.loads(json.dumps(stream.response["output"]))
    items = normalized(msgspec.convert(output, list[Item]))
    asked = from_responses(ResponsesRequest(), Conversation(own=items), ToolTable(), ImageReader())
    assert heard(asked.messages[0].parts) == joined(said)
