"""The stream of /v1/responses, event by event, and the whole response from the same events."""

import json
from typing import Any

from clients.event_order import check_responses
from support_engine import FakeEngine, Script, answer, call
from support_http import client_of, events_of, shown

from mlx_optiq_ext.errors import Overloaded, PromptTooLong, QueueFull, RequestError
from mlx_optiq_ext.serve.responses.from_events import HEARTBEATS_PER_LINE, Drafting, ResponseStream
from mlx_optiq_ext.serve.unseen import conceal
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Accepted, EventSink, Failed, Started, TextDelta, TokenLogprob

BODY: dict[str, Any] = {"model": "m", "input": "hi"}
VOLATILE = ("id", "created_at", "completed_at", "item_id")
USAGE = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 0},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 112,
}
BEGUN: dict[str, Any] = {
    "id": "*",
    "object": "response",
    "created_at": "*",
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "conversation": None,
    "error": None,
    "frequency_penalty": 0.0,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": "m",
    "output": [],
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "previous_response_id": None,
    "prompt": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": None,
    "user": None,
}
MESSAGE = {"type": "message", "id": "*", "role": "assistant"}
PLACE = {"item_id": "*", "output_index": 0}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def stream(script: Script, **fields: Any) -> list[dict[str, Any]]:
    with client_of(FakeEngine(script)) as client:
        answered = client.post("/v1/responses", json={**BODY, "stream": True, **fields})
    assert answered.status_code == 200
    events = events_of(answered.text)
    if events[-1][0] != "response.failed":
        check_responses(events)
    told: list[dict[str, Any]] = shown([json.loads(data) for _, data in events], *VOLATILE)
    assert [each.pop("sequence_number") for each in told] == list(range(len(told)))
    return told


def whole(script: Script, **fields: Any) -> dict[str, Any]:
    with client_of(FakeEngine(script)) as client:
        answered = client.post("/v1/responses", json={**BODY, **fields})
    assert answered.status_code == 200
    document: dict[str, Any] = shown(answered.json(), *VOLATILE)
    return document


def test_a_plain_answer_as_a_stream() -> None:
    item = {**MESSAGE, "status": "completed", "content": [text_part("Hello")]}
    delta = {"type": "response.output_text.delta", **PLACE, "content_index": 0, "logprobs": []}
    ended = {"status": "completed", "completed_at": "*", "output": [item], "usage": USAGE}
    assert stream(answer("Hel", "lo")) == [
        {"type": "response.created", "response": BEGUN},
        {"type": "response.in_progress", "response": BEGUN},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**MESSAGE, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **PLACE, "content_index": 0, "part": text_part("")},
        {**delta, "delta": "Hel"},
        {**delta, "delta": "lo"},
        {
            "type": "response.output_text.done",
            **PLACE,
            "content_index": 0,
            "text": "Hello",
            "logprobs": [],
        },
        {"type": "response.content_part.done", **PLACE, "content_index": 0, "part": text_part("Hello")},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {**BEGUN, **ended}},
    ]


def test_the_whole_response_says_what_was_asked() -> None:
    tool = {"type": "function", "name": "f"}
    said = whole(
        answer("Hello"),
        instructions="be brief",
        metadata={"a": "b"},
        temperature=0.5,
        tools=[tool, {"type": "web_search"}],
        tool_choice={"type": "function", "name": "f"},
        store=False,
        max_output_tokens=7,
        truncation="auto",
    )
    assert said == {
        **BEGUN,
        "status": "completed",
        "completed_at": "*",
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "tools": [{**tool, "description": None, "parameters": None, "strict": None}, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "f"},
        "store": False,
        "max_output_tokens": 7,
        "output": [{**MESSAGE, "status": "completed", "content": [text_part("Hello")]}],
        "usage": USAGE,
    }


def test_thoughts_are_a_summary_where_one_is_asked_for() -> None:
    fields = {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}
    told = stream(answer("yes", reasoning="hm"), **fields)
    part = {"type": "summary_text", "text": "hm"}
    item = {"type": "reasoning", "id": "*", "status": "completed", "summary": [part]}
    place = {**PLACE, "summary_index": 0}
    assert told[3:8] == [
        {"type": "response.reasoning_summary_part.added", **place, "part": {**part, "text": ""}},
        {"type": "response.reasoning_summary_text.delta", **place, "delta": "hm"},
        {"type": "response.reasoning_summary_text.done", **place, "text": "hm"},
        {"type": "response.reasoning_summary_part.done", **place, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "encrypted_content": conceal("hm")},
        },
    ]


def test_thoughts_are_shown_as_they_are_otherwise() -> None:
    told = stream(answer("yes", reasoning="hm"))
    assert [each["type"] for each in told[2:8]] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert told[7]["item"] == {
        "type": "reasoning",
        "id": "*",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }


def test_a_call_in_a_namespace_streams_and_has_its_namespace_again() -> None:
    inner = {"type": "function", "name": "spawn", "parameters": {"type": "object"}}
    script = answer(*call("agents.spawn", '{"n":', "1}"), reason="tool_calls")
    told = stream(script, tools=[{"type": "namespace", "name": "agents", "tools": [inner]}])
    item = {
        "type": "function_call",
        "id": "*",
        "status": "in_progress",
        "call_id": "call_0123456789abcdefghijkl",
        "name": "spawn",
        "namespace": "agents",
        "arguments": "",
    }
    delta = {"type": "response.function_call_arguments.delta", **PLACE}
    assert told[2:7] == [
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {**delta, "delta": '{"n":'},
        {**delta, "delta": "1}"},
        {
            "type": "response.function_call_arguments.done",
            **PLACE,
            "name": "spawn",
            "arguments": '{"n":1}',
        },
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "status": "completed", "arguments": '{"n":1}'},
        },
    ]


def test_a_custom_tool_gets_its_text() -> None:
    script = answer(*call("patch", '{"input": ', '"*** Begin"}'), reason="tool_calls")
    told = stream(script, tools=[{"type": "custom", "name": "patch"}])
    assert [(each["type"], each.get("delta"), each.get("input")) for each in told[3:5]] == [
        ("response.custom_tool_call_input.delta", "*** Begin", None),
        ("response.custom_tool_call_input.done", None, "*** Begin"),
    ]
    item = told[5]["item"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", "*** Begin")


def test_an_answer_that_was_cut_is_incomplete() -> None:
    told = stream(answer("Hel", reason="length"))
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["status"] == "incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert told[-1]["response"]["output"][0]["status"] == "incomplete"


def test_log_probabilities_come_with_the_text() -> None:
    top = TokenLogprob(token="He", token_bytes=b"He", logprob=-0.5)
    token = TokenLogprob(token="Hé", token_bytes="Hé".encode(), logprob=-0.25, top=(top,))
    said = whole(answer(TextDelta(text="Hé", logprobs=(token,))), top_logprobs=1)
    assert said["output"][0]["content"][0]["logprobs"] == [
        {
            "token": "Hé",
            "bytes": [72, 195, 169],
            "logprob": -0.25,
            "top_logprobs": [{"token": "He", "bytes": [72, 101], "logprob": -0.5}],
        }
    ]


def failing(request: Any) -> list[Any]:
    lost = Failed(kind="EngineError", message="the step failed", status=503)
    return [Started(cached_tokens=0), TextDelta(text="Hel"), lost]


def test_an_error_in_the_middle_is_a_failed_response() -> None:
    last = stream(failing)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the step failed"}


def test_an_error_in_the_middle_of_a_whole_answer_is_a_status_and_nothing_is_stored() -> None:
    with client_of(FakeEngine(failing)) as client:
        answered = client.post("/v1/responses", json=BODY)
    assert answered.status_code == 503
    assert answered.json()["error"]["type"] == "server_error"


def test_a_refusal_comes_before_the_stream_in_the_right_shape() -> None:
    cases = [
        (QueueFull("64 requests wait", retry_after_s=3), 429, "rate_limit_exceeded", "3"),
        (Overloaded("no memory now"), 503, "server_overloaded", "5"),
        (PromptTooLong(5000, 4096), 400, "context_length_exceeded", None),
    ]
    for error, status, code, retry_after in cases:
        with client_of(FakeEngine(refuse=error)) as client:
            answered = client.post("/v1/responses", json={**BODY, "stream": True})
        assert answered.status_code == status
        assert answered.json()["error"]["code"] == code
        assert answered.headers.get("retry-after") == retry_after
    assert "maximum context length is 4096 tokens" in answered.json()["error"]["message"]


def test_the_heartbeat_repeats_that_it_is_in_progress() -> None:
    stream = ResponseStream(Drafting(document=dict(BEGUN)))
    stream.first(Accepted(prompt_tokens=1, model="m"))
    lines = [stream.heartbeat() for _ in range(2 * HEARTBEATS_PER_LINE)]
    told = [json.loads(events_of(line.decode())[0][1]) for line in lines if line]
    assert [(each["type"], each["sequence_number"]) for each in told] == [
        ("response.in_progress", 2),
        ("response.in_progress", 3),
    ]


def test_a_conversation_goes_on_from_a_stored_response() -> None:
    engine = FakeEngine(answer("Hello", reasoning="hm"), answer("again"))
    with client_of(engine) as client:
        first = client.post("/v1/responses", json={**BODY, "instructions": "only now"}).json()
        name = first["id"]
        assert client.get(f"/v1/responses/{name}").json() == first
        listed = client.get(f"/v1/responses/{name}/input_items").json()
        reference = {"type": "item_reference", "id": first["output"][1]["id"]}
        on = {"previous_response_id": name, "input": [reference, {"role": "user", "content": "on"}]}
        second = client.post("/v1/responses", json=on).json()
        counted = client.post("/v1/responses/input_tokens", json=on).json()
        gone = client.delete(f"/v1/responses/{name}").json()
        missing = client.get(f"/v1/responses/{name}")
    assert [item["content"][0]["text"] for item in listed["data"]] == ["hi"]
    assert second["previous_response_id"] == name
    assert engine.requests[1].messages == engine.requests[2].messages
    roles = [message.role for message in engine.requests[1].messages]
    assert roles == ["user", "assistant", "user"]
    assert counted == {"object": "response.input_tokens", "input_tokens": 4}
    assert gone == {"id": name, "object": "response", "deleted": True}
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "response_not_found"


def test_what_is_not_stored_is_not_found() -> None:
    with client_of(FakeEngine()) as client:
        name = client.post("/v1/responses", json={**BODY, "store": False}).json()["id"]
        for answered in (
            client.get(f"/v1/responses/{name}"),
            client.get(f"/v1/responses/{name}/input_items"),
            client.post(f"/v1/responses/{name}/cancel"),
            client.post("/v1/responses", json={**BODY, "previous_response_id": name}),
            client.post("/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_x"}]}),
            client.post("/v1/responses/compact", json=BODY),
        ):
            assert answered.status_code == 404
            assert answered.json()["error"]["type"] == "invalid_request_error"


def test_a_response_that_has_ended_cannot_be_cancelled_or_streamed_again() -> None:
    with client_of(FakeEngine()) as client:
        name = client.post("/v1/responses", json=BODY).json()["id"]
        assert client.post(f"/v1/responses/{name}/cancel").status_code == 400
        assert client.get(f"/v1/responses/{name}?stream=true").json()["error"]["param"] == "stream"


def test_a_schema_that_the_engine_refuses_is_blamed_by_this_dialects_name() -> None:
    class Refusing(FakeEngine):
        def submit(self, request: Generation, deliver: EventSink) -> str:
            assert request.constraint is not None
            raise RequestError("cannot be enforced", param=request.constraint.param)

    with client_of(Refusing()) as client:
        error = client.post(
            "/v1/responses", json={**BODY, "text": {"format": {"type": "json_schema", "schema": {}}}}
        ).json()["error"]
    assert error["param"] == "text.format.schema"
    assert error["message"] == "text.format.schema: cannot be enforced"
