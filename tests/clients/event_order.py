"""Whether the events of a stream come in the order that its protocol promises, for each of the three.

Each function raises ``AssertionError`` with the first thing that is wrong.
"""

import json
from typing import Any

__all__ = ["check_chat", "check_messages", "check_responses"]

Events = list[tuple[str | None, str]]


def check_messages(events: Events) -> None:
    """Anthropic Messages: blocks are numbered, opened and closed one after the other."""
    assert [name for name, _ in events] == [json.loads(data)["type"] for _, data in events]
    told = [json.loads(data) for name, data in events if name != "ping"]
    assert told[0]["type"] == "message_start"
    assert told[0]["message"]["content"] == []
    assert told[0]["message"]["usage"]["input_tokens"] > 0
    assert [each["type"] for each in told[-2:]] == ["message_delta", "message_stop"]
    assert told[-2]["delta"]["stop_reason"] is not None
    assert told[-2]["usage"]["output_tokens"] >= 0
    deltas = {"text": {"text_delta"}, "tool_use": {"input_json_delta"}}
    deltas["thinking"] = {"thinking_delta", "signature_delta"}
    index, kind = -1, None
    for each in told[1:-2]:
        if each["type"] == "content_block_start":
            assert kind is None, "a block begins inside another"
            index, kind = index + 1, each["content_block"]["type"]
        elif each["type"] == "content_block_delta":
            assert kind is not None
            assert each["delta"]["type"] in deltas[kind]
        else:
            assert each["type"] == "content_block_stop"
            assert kind is not None
            kind = None
        assert each["index"] == index
    assert kind is None, "the last block is not closed"


def check_responses(events: Events) -> None:
    """OpenAI Responses: numbered events, items one after the other, everything said again at the end."""
    told = [json.loads(data) for _, data in events]
    assert [name for name, _ in events] == [each["type"] for each in told]
    assert [each["sequence_number"] for each in told] == list(range(len(told)))
    assert [each["type"] for each in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
    items: list[dict[str, Any]] = []
    opened: dict[str, Any] | None = None
    for each in told[2:-1]:
        if each["type"] == "response.in_progress":
            continue
        assert each["output_index"] == len(items)
        if each["type"] == "response.output_item.added":
            assert opened is None, "an item begins inside another"
            opened = each["item"]
        elif each["type"] == "response.output_item.done":
            assert opened is not None
            assert each["item"]["id"] == opened["id"]
            items.append(each["item"])
            opened = None
        else:
            assert opened is not None
            assert each["item_id"] == opened["id"]
    assert opened is None, "the last item is not done"
    assert told[-1]["response"]["output"] == items
    for item in items:
        _check_item(item, [each for each in told if each.get("item_id") == item["id"]])


def _check_item(item: dict[str, Any], told: list[dict[str, Any]]) -> None:
    kinds = [each["type"].removeprefix("response.") for each in told]
    deltas = "".join(each["delta"] for each in told if each["type"].endswith(".delta"))
    if item["type"] == "message":
        assert kinds[0] == "content_part.added"
        assert kinds[-2:] == ["output_text.done", "content_part.done"]
        assert set(kinds[1:-2]) <= {"output_text.delta"}
        assert item["content"][0]["text"] == deltas
    elif item["type"] == "function_call":
        assert kinds[-1] == "function_call_arguments.done"
        assert set(kinds[:-1]) <= {"function_call_arguments.delta"}
        assert item["arguments"] == deltas
    elif item["type"] == "reasoning":
        shown = item["summary"] or item["content"]
        assert kinds[0].endswith("part.added")
        assert kinds[-1].endswith("part.done")
        assert shown[0]["text"] == deltas


def check_chat(events: Events) -> None:
    """OpenAI chat: the role first, one reason to finish, tool calls with an index, ``[DONE]`` last."""
    assert events[-1] == (None, "[DONE]")
    told = [json.loads(data) for _, data in events[:-1]]
    choices = [choice for each in told for choice in each["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    reasons = [choice["finish_reason"] for choice in choices]
    assert sum(reason is not None for reason in reasons) == 1
    assert reasons[-1] is not None
    for choice in choices:
        for call in choice["delta"].get("tool_calls") or ():
            assert isinstance(call["index"], int)
    assert len({each["id"] for each in told}) == 1
