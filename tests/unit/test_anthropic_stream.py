"""The stream of /v1/messages, line by line, and the whole message from the same events."""

import json
from typing import Any

from clients.event_order import check_messages
from support_engine import FakeEngine, Script, answer, call
from support_http import client_of, events_of, shown

from mlx_optiq_ext.errors import Overloaded, PromptTooLong, QueueFull, RequestError
from mlx_optiq_ext.serve.anthropic.from_events import MessageStream
from mlx_optiq_ext.serve.unseen import conceal, reveal
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import EventSink, Failed, Started, TextDelta

BODY = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
START_USAGE = {
    "input_tokens": 100,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 0,
    "output_tokens_details": {"thinking_tokens": 0},
}
END_USAGE = {**START_USAGE, "input_tokens": 36, "cache_read_input_tokens": 64, "output_tokens": 12}


def stream(script: Script, **fields: Any) -> list[dict[str, Any]]:
    with client_of(FakeEngine(script)) as client:
        answered = client.post("/v1/messages", json={**BODY, "stream": True, **fields})
    assert answered.status_code == 200
    assert answered.headers["content-type"].startswith("text/event-stream")
    assert answered.headers["request-id"].startswith("req_")
    events = events_of(answered.text)
    if events[-1][0] != "error":
        check_messages(events)
    return [json.loads(data) for _, data in events]


def whole(script: Script, **fields: Any) -> dict[str, Any]:
    with client_of(FakeEngine(script)) as client:
        answered = client.post("/v1/messages", json={**BODY, **fields})
    assert answered.status_code == 200
    document: dict[str, Any] = answered.json()
    return document


def test_a_plain_answer_as_a_stream() -> None:
    message: dict[str, Any] = {
        "id": "*",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": START_USAGE,
    }
    assert shown(stream(answer("Hel", "lo")), "id") == [
        {"type": "message_start", "message": message},
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": END_USAGE,
        },
        {"type": "message_stop"},
    ]


def test_thought_text_and_two_calls_as_a_stream() -> None:
    script = answer(
        "I look.",
        *call("a", '{"x":', "1}"),
        *call("b", "{}", index=1, id="callzz"),
        reasoning="hm",
        reason="tool_calls",
    )
    told = stream(script)
    use = {"type": "tool_use", "id": "toolu_0123456789abcdefghijkl", "name": "a", "input": {}}
    assert told[2:-2] == [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "signature_delta", "signature": conceal("")},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I look."}},
        {"type": "content_block_stop", "index": 1},
        {"type": "content_block_start", "index": 2, "content_block": use},
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '{"x":'},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": "1}"},
        },
        {"type": "content_block_stop", "index": 2},
        {
            "type": "content_block_start",
            "index": 3,
            "content_block": {**use, "id": "toolu_zz", "name": "b"},
        },
        {
            "type": "content_block_delta",
            "index": 3,
            "delta": {"type": "input_json_delta", "partial_json": "{}"},
        },
        {"type": "content_block_stop", "index": 3},
    ]
    assert told[-2]["delta"]["stop_reason"] == "tool_use"


def test_the_whole_message_of_the_same_events() -> None:
    script = answer("I ", "look.", *call("a", '{"x":', "1}"), reasoning="hm", reason="tool_calls")
    assert shown(whole(script), "id") == {
        "id": "*",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": conceal("")},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "*", "name": "a", "input": {"x": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {**END_USAGE, "output_tokens_details": {"thinking_tokens": 4}},
    }


def test_omitted_thoughts_travel_in_the_signature() -> None:
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    told = stream(answer("yes", reasoning="déjà vu"), **hidden)
    assert not [each for each in told if each.get("delta", {}).get("type") == "thinking_delta"]
    (signature,) = [
        each["delta"]["signature"] for each in told if each.get("delta", {}).get("type") == "signature_delta"
    ]
    assert reveal(signature) == "déjà vu"
    block = whole(answer("yes", reasoning="déjà vu"), **hidden)["content"][0]
    assert block == {"type": "thinking", "thinking": "", "signature": signature}


def test_every_reason_to_stop() -> None:
    assert whole(answer("x", reason="length"))["stop_reason"] == "max_tokens"
    stopped = whole(answer("x", reason="stop_sequence", stop_sequence="END"))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "END")


def test_an_answer_without_content_is_a_message_without_blocks() -> None:
    assert whole(answer())["content"] == []
    assert [each["type"] for each in stream(answer())] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]


def failing(request: Any) -> list[Any]:
    lost = Failed(kind="EngineError", message="the step failed", status=503)
    return [Started(cached_tokens=0), TextDelta(text="Hel"), lost]


def test_an_error_in_the_middle_ends_the_stream_by_name() -> None:
    last = stream(failing)[-1]
    assert shown(last, "request_id") == {
        "type": "error",
        "error": {"type": "api_error", "message": "the step failed"},
        "request_id": "*",
    }


def test_an_error_in_the_middle_of_a_whole_answer_is_a_status() -> None:
    with client_of(FakeEngine(failing)) as client:
        answered = client.post("/v1/messages", json=BODY)
    assert answered.status_code == 503
    assert answered.json()["error"]["type"] == "api_error"
    assert answered.json()["request_id"] == answered.headers["request-id"]


def test_a_refusal_comes_before_the_stream_in_the_right_shape() -> None:
    cases = [
        (QueueFull("64 requests wait", retry_after_s=3), 429, "rate_limit_error", "3"),
        (Overloaded("no memory now"), 529, "overloaded_error", "5"),
        (PromptTooLong(5000, 4096), 400, "invalid_request_error", None),
    ]
    for error, status, kind, retry_after in cases:
        with client_of(FakeEngine(refuse=error)) as client:
            answered = client.post("/v1/messages", json={**BODY, "stream": True})
        assert answered.status_code == status
        assert answered.json()["error"] == {"type": kind, "message": str(error)}
        assert answered.headers.get("retry-after") == retry_after
    assert "prompt is too long: 5000 tokens > 4096 maximum" in answered.text


def test_the_heartbeat_is_a_ping() -> None:
    assert MessageStream().heartbeat() == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_counting_asks_for_the_same_prompt_as_answering() -> None:
    engine = FakeEngine()
    body = {**BODY, "system": "rules", "tools": [{"name": "a", "input_schema": {"type": "object"}}]}
    with client_of(engine) as client:
        counted = client.post("/v1/messages/count_tokens?beta=true", json=body)
        client.post("/v1/messages?beta=true", json=body)
    assert counted.json() == {"input_tokens": 2}
    count, run = engine.requests
    assert (count.messages, count.tools, count.tool_choice) == (run.messages, run.tools, run.tool_choice)


def test_wrong_types_name_the_field_and_unknown_fields_are_ignored() -> None:
    with client_of(FakeEngine()) as client:
        wrong = client.post("/v1/messages", json={**BODY, "messages": [{"role": "user", "content": 5}]})
        extra = client.post(
            "/v1/messages", json={**BODY, "safeguards": [1], "context_management": {}, "new": None}
        )
    assert wrong.status_code == 400
    assert "messages[0].content" in wrong.json()["error"]["message"]
    assert extra.status_code == 200


def test_a_schema_that_the_engine_refuses_is_blamed_by_this_dialects_name() -> None:
    class Refusing(FakeEngine):
        def submit(self, request: Generation, deliver: EventSink) -> str:
            assert request.constraint is not None
            raise RequestError("cannot be enforced", param=request.constraint.param)

    with client_of(Refusing()) as client:
        error = client.post(
            "/v1/messages",
            json={**BODY, "output_config": {"format": {"type": "json_schema", "schema": {}}}},
        ).json()["error"]
    assert error["message"] == "output_config.format.schema: cannot be enforced"
