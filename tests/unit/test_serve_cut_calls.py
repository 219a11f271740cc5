"""A call in which the answer was cut is no call that a client could run, in any dialect."""

import json
from typing import Any

import pytest

from mlx_optiq_ext.serve.anthropic.from_events import MessageStream
from mlx_optiq_ext.serve.openai.from_events import ChatCollector, ChatStream
from mlx_optiq_ext.serve.responses.from_events import Drafting, ResponseStream
from mlx_optiq_ext.types.events import (
    Accepted,
    Event,
    Finished,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)

ACCEPTED = Accepted(prompt_tokens=5, model="m")
FIRST, SECOND = "call" + "a" * 24, "call" + "b" * 24
WHOLE = '{"path": "x"}'


def _events(reason: Any, *pieces: str) -> list[Event]:
    """A text, one whole call, and a second one that was cut after these pieces."""
    return [
        TextDelta(text="So: "),
        ToolCallStart(index=0, id=FIRST, name="Read"),
        ToolCallDelta(index=0, arguments=WHOLE),
        ToolCallEnd(index=0, id=FIRST, name="Read", arguments=WHOLE),
        ToolCallStart(index=1, id=SECOND, name="Write"),
        *(ToolCallDelta(index=1, arguments=piece) for piece in pieces),
        Finished(reason=reason, usage=Usage(prompt_tokens=5, completion_tokens=9)),
    ]


def _told(stream: bytes) -> list[dict[str, Any]]:
    lines = [
        line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: ")
    ]
    return [json.loads(line) for line in lines if line != "[DONE]"]


CUTS = pytest.mark.parametrize("pieces", [(), ('{"path"',), ('{"path": "a", ', '"content": "half')], ids=len)
REASONS = pytest.mark.parametrize("reason", ["length", "cancelled"])


@CUTS
@REASONS
def test_messages(pieces: tuple[str, ...], reason: str) -> None:
    stream = MessageStream()
    told = _told(stream.first(ACCEPTED) + b"".join(stream.feed(event) for event in _events(reason, *pieces)))
    kinds = [each["type"] for each in told]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    partial = [each["delta"]["partial_json"] for each in told if each.get("index") == 2 and "delta" in each]
    assert "".join(partial) == "".join(pieces)
    assert told[-2]["delta"]["stop_reason"] == ("max_tokens" if reason == "length" else "pause_turn")
    content = stream.message()["content"]
    assert [block["type"] for block in content] == ["text", "tool_use", "text"]
    assert content[1]["input"] == {"path": "x"}
    assert content[2]["text"] == f"[cut: Write {''.join(pieces)}]"


@CUTS
@REASONS
def test_responses(pieces: tuple[str, ...], reason: str) -> None:
    stream = ResponseStream(Drafting(document={"id": "resp"}))
    told = _told(stream.first(ACCEPTED) + b"".join(stream.feed(event) for event in _events(reason, *pieces)))
    done = [each for each in told if each["type"] == "response.function_call_arguments.done"]
    assert [each["arguments"] for each in done] == [WHOLE]
    items = [each["item"] for each in told if each["type"] == "response.output_item.done"]
    assert [item["status"] for item in items] == ["completed", "completed", "incomplete"]
    assert items[2]["arguments"] == "".join(pieces)
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["output"][2]["status"] == "incomplete"


@CUTS
@REASONS
def test_chat(pieces: tuple[str, ...], reason: str) -> None:
    stream, collector = ChatStream(), ChatCollector()
    collector.first(ACCEPTED)
    chunks = stream.first(ACCEPTED)
    for event in _events(reason, *pieces):
        chunks += stream.feed(event, 0)
        collector.feed(event, 0)
    reasons = [each["choices"][0]["finish_reason"] for each in _told(chunks) if each["choices"]]
    assert [each for each in reasons if each] == ["length"]
    (choice,) = collector.answer()["choices"]
    first, second = choice["message"]["tool_calls"]
    assert first["function"]["arguments"] == WHOLE
    assert second["function"]["arguments"] == "".join(pieces)
    with pytest.raises(ValueError, match=r"."):
        json.loads(second["function"]["arguments"])
