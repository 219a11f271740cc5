"""Chat completions: what a request means, and every byte of the answers."""

import base64
from typing import Any

import msgspec
import pytest
from support_engine import FakeEngine, answer, call
from support_http import client_of, events_of, shown

from mlx_optiq_ext.errors import Overloaded, PromptTooLong, RequestError
from mlx_optiq_ext.serve.body import decode_json
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.openai.schema import ChatRequest
from mlx_optiq_ext.serve.openai.to_generation import chat_generations
from mlx_optiq_ext.types.chat import (
    Constraint,
    Generation,
    Image,
    Message,
    Reasoning,
    ReasoningOptions,
    Sampling,
    Text,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from mlx_optiq_ext.types.events import Failed, TextDelta, TokenLogprob

HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("look", "write")
]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
VOLATILE = ("id", "created")


def _asked(headers: dict[str, str] | None = None, **fields: Any) -> Generation:
    body = msgspec.json.encode({"messages": HI, **fields})
    return chat_generations(decode_json(body, ChatRequest), ImageReader(), headers or {})[0]


def _refused(**fields: Any) -> str | None:
    with pytest.raises(RequestError) as caught:
        _asked(**fields)
    return caught.value.param


def test_every_turn_keeps_its_parts_in_order() -> None:
    calls = [
        {"id": "callA", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
        {"id": "callB", "type": "function", "function": {"name": "look", "arguments": "not json"}},
    ]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "really"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PNG}}],
        },
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "callA", "content": "one", "name": "look"},
        {"role": "tool", "tool_call_id": "callB", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "", "reasoning": "so"},
        {"role": "user", "content": ""},
    ]
    assert _asked(messages=messages).messages == (
        Message(role="system", parts=(Text(text="be brief"), Text(text="really"))),
        Message(
            role="user",
            parts=(
                Text(text="see"),
                Image(data=b"pixels", media_type="image/png", param="messages[2].content[1].image_url.url"),
            ),
        ),
        Message(
            role="assistant",
            parts=(
                Reasoning(text="hm"),
                ToolCall(id="callA", name="look", arguments={"a": 1}),
                ToolCall(id="callB", name="look", arguments={"_raw": "not json"}),
            ),
        ),
        Message(
            role="tool",
            parts=(
                ToolResult(id="callA", parts=(Text(text="one"),), name="look"),
                ToolResult(id="callB", parts=(Text(text="two"),), name="look"),
            ),
        ),
        Message(role="assistant", parts=(Reasoning(text="so"),)),
        Message(role="user", parts=(Text(text=""),)),
    )


def test_sampling_limits_and_stops() -> None:
    asked = _asked(
        temperature=1,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"7": -100},
        seed=-5,
        logprobs=True,
        top_logprobs=3,
        stop=["a", "b"],
        max_tokens=9,
        max_completion_tokens=7,
        unknown_field={"x": 1},
    )
    assert asked.sampling == Sampling(
        temperature=1.0,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        logit_bias={7: -100.0},
        seed=-5,
        logprobs=3,
    )
    assert asked.stop == ("a", "b")
    assert asked.max_tokens == 7
    assert _asked(stop="x").stop == ("x",)
    assert _asked(logprobs=True).sampling.logprobs == 0
    assert _asked(logprobs=False).sampling.logprobs is None


def test_several_answers_differ_though_they_share_a_seed() -> None:
    body = decode_json(msgspec.json.encode({"messages": HI, "n": 3, "seed": 4}), ChatRequest)
    assert [g.sampling.seed for g in chat_generations(body, ImageReader(), {})] == [4, 5, 6]


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint(kind="json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}},
                }
            },
            Constraint(
                kind="json_schema", value={"type": "object"}, param="response_format.json_schema.schema"
            ),
        ),
        ({"guided_regex": "a+"}, Constraint(kind="regex", value="a+", param="guided_regex")),
        ({"guided_grammar": "start: A"}, Constraint(kind="lark", value="start: A", param="guided_grammar")),
        ({"grammar": "start: A"}, Constraint(kind="lark", value="start: A", param="grammar")),
    ],
)
def test_what_the_answer_must_look_like(fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert _asked(**fields).constraint == constraint


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({}, ReasoningOptions()),
        ({"reasoning_effort": "none"}, ReasoningOptions(enabled=False)),
        ({"reasoning_effort": "xhigh"}, ReasoningOptions(enabled=True, effort="xhigh")),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ReasoningOptions(enabled=False)),
    ],
)
def test_reasoning(fields: dict[str, Any], reasoning: ReasoningOptions) -> None:
    assert _asked(**fields).reasoning == reasoning


@pytest.mark.parametrize(
    ("choice", "parallel", "expected", "names"),
    [
        (None, None, ToolChoice(), ["look", "write"]),
        ("none", None, ToolChoice(mode="none"), ["look", "write"]),
        ("required", False, ToolChoice(mode="required", parallel=False), ["look", "write"]),
        (
            {"type": "function", "function": {"name": "look"}},
            None,
            ToolChoice(mode="named", name="look"),
            ["look", "write"],
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "write"}}],
                },
            },
            None,
            ToolChoice(mode="required"),
            ["write"],
        ),
    ],
)
def test_tool_choice(choice: Any, parallel: bool | None, expected: ToolChoice, names: list[str]) -> None:
    tools = [*TOOLS, {"type": "web_search"}]
    asked = _asked(tools=tools, tool_choice=choice, parallel_tool_calls=parallel)
    assert asked.tool_choice == expected
    assert [tool.name for tool in asked.tools] == names


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        ({"x-session-affinity": "a", "x-session-id": "b"}, {"user": "c"}, "a"),
        ({"x-session-id": "b"}, {"prompt_cache_key": "c"}, "b"),
        ({}, {"prompt_cache_key": "c", "user": "d"}, "c"),
        ({}, {"user": "d"}, "d"),
        ({}, {}, ""),
    ],
)
def test_session(headers: dict[str, str], fields: dict[str, Any], session: str) -> None:
    assert _asked(headers, **fields).session == session


def _stream(engine: FakeEngine, **fields: Any) -> list[Any]:
    with client_of(engine) as client:
        text = client.post("/v1/chat/completions", json={"messages": HI, "stream": True, **fields}).text
    return [d if d == "[DONE]" else shown(msgspec.json.decode(d), *VOLATILE) for _, d in events_of(text)]


def _chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {
        "id": "*",
        "object": "chat.completion.chunk",
        "created": "*",
        "model": "org/tiny",
        "choices": [choice],
        **more,
    }


USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 12,
    "total_tokens": 112,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 4},
}


def test_stream_of_reasoning_text_and_calls() -> None:
    script = answer("Let me see.", *call("look", '{"a":', "1}"), reasoning="hm", reason="tool_calls")
    call_start = {
        "index": 0,
        "id": "*",
        "type": "function",
        "function": {"name": "look", "arguments": ""},
    }
    assert _stream(FakeEngine(script), stream_options={"include_usage": True}) == [
        _chunk({"role": "assistant", "content": ""}, usage=None),
        _chunk({"reasoning_content": "hm"}, usage=None),
        _chunk({"content": "Let me see."}, usage=None),
        _chunk({"tool_calls": [call_start]}, usage=None),
        _chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]}, usage=None),
        _chunk({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}, usage=None),
        _chunk({}, "tool_calls", usage=None),
        {**_chunk({}), "choices": [], "usage": USAGE},
        "[DONE]",
    ]


def test_stream_bytes_are_stable() -> None:
    with client_of(FakeEngine(answer("é"))) as client:
        sent = client.post("/v1/chat/completions", json={"messages": HI, "stream": True}).content
    events = sent.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert all(event.startswith(b'data: {"id":"chatcmpl-') for event in events[:-2])
    assert '"delta":{"content":"é"}'.encode() in events[1]
    assert len(events) == 5


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("stop", "stop"),
        ("stop_sequence", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("cancelled", "length"),
    ],
)
def test_exactly_one_finish_reason(reason: Any, told: str) -> None:
    chunks = _stream(FakeEngine(answer("a", reason=reason)))
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c != "[DONE]"]
    assert [r for r in reasons if r is not None] == [told]


def test_failure_in_the_middle_ends_the_stream_with_an_error() -> None:
    script = answer("a", Failed.of(Overloaded("no memory", retry_after_s=2.0)))
    chunks = _stream(FakeEngine(script))
    assert chunks[-1] == {
        "error": {"message": "no memory", "type": "server_error", "param": None, "code": "server_overloaded"}
    }
    assert len(chunks) == 3


def _whole(engine: FakeEngine, **fields: Any) -> Any:
    with client_of(engine) as client:
        answered = client.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert answered.status_code == 200
    return shown(answered.json(), *VOLATILE)


def test_whole_answer() -> None:
    script = answer(*call("look", '{"a":', "1}"), reasoning="hm", reason="tool_calls")
    message = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [{"id": "*", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}],
    }
    assert _whole(FakeEngine(script)) == {
        "id": "*",
        "object": "chat.completion",
        "created": "*",
        "model": "org/tiny",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": USAGE,
    }


def test_several_answers_count_the_prompt_once() -> None:
    document = _whole(FakeEngine(answer("a"), answer("b", "c")), n=2)
    assert sorted(c["message"]["content"] for c in document["choices"]) == ["a", "bc"]
    assert [c["index"] for c in document["choices"]] == [0, 1]
    assert (document["usage"]["prompt_tokens"], document["usage"]["completion_tokens"]) == (100, 24)


def test_log_probabilities_of_the_text() -> None:
    other = TokenLogprob(token="b", token_bytes=b"b", logprob=float("-inf"))
    drawn = TokenLogprob(token="é", token_bytes="é".encode(), logprob=-0.5, top=(other,))
    script = answer(TextDelta(text="é", logprobs=(drawn,)))
    expected = {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [{"token": "b", "logprob": -9999.0, "bytes": [98]}],
            }
        ]
    }
    assert _whole(FakeEngine(script), logprobs=True, top_logprobs=1)["choices"][0]["logprobs"] == expected
    assert _stream(FakeEngine(script), logprobs=True)[1]["choices"][0]["logprobs"] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long_is_a_400_with_the_limit(stream: bool) -> None:
    def script(request: Generation) -> Any:
        return [Failed.of(PromptTooLong(5000, 4096))]

    with client_of(FakeEngine(script)) as client:
        answered = client.post("/v1/chat/completions", json={"messages": HI, "stream": stream})
    assert answered.status_code == 400
    error = answered.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "the maximum context length is 4096 tokens; prompt is too long: 5000 tokens > 4096 maximum"
    )


def test_memory_that_is_short_is_a_503_here() -> None:
    with client_of(FakeEngine(refuse=Overloaded("no memory"))) as client:
        answered = client.post("/v1/chat/completions", json={"messages": HI})
    assert (answered.status_code, answered.headers["retry-after"]) == (503, "5")
