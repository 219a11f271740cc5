"""Whatever is sent: a 4xx in the shape of the dialect, and the next request is served.

The engine is scripted, so this is about what HTTP and the dialects let through; what only a tokenizer or a
grammar can refuse is tested with the engine.
"""

import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from support_engine import FakeEngine
from support_http import live

CHAT, LEGACY, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
HI: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ASK: dict[str, Any] = {**HI, "max_tokens": 5}
DEEP = b"[" * 20_000 + b"]" * 20_000
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PIXEL = "data:image/png;base64,"


def _user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def _picture(url: Any) -> dict[str, Any]:
    return _user([{"type": "image_url", "image_url": url}])


CHAT_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "system", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
    (_user(5), "messages[0].content"),
    (_user([{"type": "text"}]), "messages[0].content[0].text"),
    (_user([{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    (_user([{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0].type"),
    (_picture({"url": "http://169.254.169.254/latest/meta-data"}), "messages[0].content[0].image_url.url"),
    (_picture({"url": "file:///etc/passwd"}), "messages[0].content[0].image_url.url"),
    (_picture({"url": PIXEL + "!!"}), "messages[0].content[0].image_url.url"),
    (_picture("data:text/html;base64,AAAA"), "messages[0].content[0].image_url"),
    (_picture(5), "messages[0].content[0].image_url"),
    (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": PIXEL + "AAAA"}]}]},
        "messages[0].content[0]",
    ),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": "x"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"seed": "x"}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 5}, "stream_options"),
    ({"model": 5}, "model"),
]

LEGACY_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": [1], "echo": True}, "echo"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
]

EMBED_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "dimensions": 99}, "dimensions"),
]

MESSAGES_FIELDS: list[dict[str, Any]] = [
    {"messages": None},
    {"messages": "hi"},
    {"messages": [{"role": "king", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": 5}]}]},
    {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
    {"max_tokens": 0},
    {"max_tokens": "5"},
    {"system": 5},
    {"temperature": "hot"},
    {"stop_sequences": 5},
    {"tools": [{"name": "f", "input_schema": 5}]},
    {"tool_choice": {"type": "tool", "name": "missing"}},
    {"thinking": {"type": "enabled", "budget_tokens": "x"}},
    {"stream": "yes"},
]

RESPONSES_FIELDS: list[dict[str, Any]] = [
    {"input": 5},
    {"input": [{"role": "king", "content": "x"}]},
    {"input": "hi", "temperature": "hot"},
    {"input": "hi", "max_output_tokens": 0},
    {"input": "hi", "previous_response_id": "resp_none"},
    {"input": "hi", "tools": 5},
    {"input": "hi", "stream": "yes"},
]

BODIES: list[tuple[bytes, str, int]] = [
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b"null", "application/json", 400),
    (b"[]", "application/json", 400),
    (b'"x"', "application/json", 400),
    (b'{"messages": NaN}', "application/json", 400),
    (b'{"a":1}{"a":1}', "application/json", 400),
    (b"\xff\xfe{\x00", "application/json", 400),
    (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', "application/json", 400),
    (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', "application/json", 400),
    (b'{"model":"m","max_tokens":5,"messages":1e999}', "application/json", 400),
    (b'{"messages":' + DEEP + b"}", "application/json", 400),
    (b'{"metadata":' + DEEP + b"}", "application/json", 400),
    (msgspec.json.encode(ASK), "text/plain", 415),
    (msgspec.json.encode(ASK), "", 415),
    (msgspec.json.encode(ASK), "application/json; charset=utf-16", 415),
    (b"a=b", "application/x-www-form-urlencoded", 415),
    (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", 415),
]


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with live(FakeEngine()) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def _check_healthy(client: httpx.Client) -> None:
    answered = client.post(CHAT, json=HI)
    assert answered.status_code == 200
    assert answered.json()["choices"][0]["message"]["content"] == "Hello world"


def _error(answered: httpx.Response, path: str) -> dict[str, Any]:
    """The error, after checking its shape."""
    document = answered.json()
    assert isinstance(document["error"]["message"], str)
    assert document["error"]["message"]
    if path.startswith(MESSAGES):
        assert document["type"] == "error"
        assert document["error"]["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
    else:
        assert set(document["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = document["error"]
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), CHAT_FIELDS)
def test_chat_fields(server: httpx.Client, fields: dict[str, Any], param: str | None, stream: bool) -> None:
    answered = server.post(CHAT, json={**HI, "stream": stream, **fields})
    assert answered.status_code == 400, answered.text
    assert _error(answered, CHAT)["param"] == param
    _check_healthy(server)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [(LEGACY, *case) for case in LEGACY_FIELDS] + [(EMBED, *case) for case in EMBED_FIELDS],
)
def test_legacy_and_embedding_fields(
    server: httpx.Client, path: str, fields: dict[str, Any], param: str | None
) -> None:
    answered = server.post(path, json=fields)
    assert answered.status_code == 400, answered.text
    assert _error(answered, path)["param"] == param
    _check_healthy(server)


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
@pytest.mark.parametrize("fields", MESSAGES_FIELDS)
def test_messages_fields(server: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    answered = server.post(path, json={**ASK, **fields})
    if path == COUNT and set(fields) & {"max_tokens", "temperature", "stop_sequences", "stream"}:
        assert answered.status_code == 200, "not among the fields that counting takes"
    else:
        assert answered.status_code == 400, answered.text
        _error(answered, path)
    _check_healthy(server)


@pytest.mark.parametrize("fields", RESPONSES_FIELDS)
def test_responses_fields(server: httpx.Client, fields: dict[str, Any]) -> None:
    answered = server.post(RESPONSES, json={"model": "m", **fields})
    assert answered.status_code in (400, 404), answered.text
    _error(answered, RESPONSES)
    _check_healthy(server)


@pytest.mark.parametrize("path", [CHAT, LEGACY, EMBED, MESSAGES, COUNT, RESPONSES])
@pytest.mark.parametrize(("body", "content_type", "status"), BODIES)
def test_bodies(server: httpx.Client, path: str, body: bytes, content_type: str, status: int) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answered = server.post(path, content=body, headers=headers)
    assert answered.status_code == status, answered.text
    _error(answered, path)
    _check_healthy(server)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_foreign_page_cannot_drive_the_model(server: httpx.Client, path: str) -> None:
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    answered = server.post(path, content=msgspec.json.encode(ASK), headers=headers)
    assert answered.status_code == 403
    assert "access-control-allow-origin" not in answered.headers
    _check_healthy(server)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\x00b", "x" * 5000, "%2e%2e/%2e%2e", "~"]
)
def test_model_names_are_names(server: httpx.Client, name: str) -> None:
    assert server.get(f"/v1/models/{quote(name, safe='')}").status_code == 404
    assert server.post(CHAT, json={**HI, "model": name}).status_code == 200
    _check_healthy(server)


def test_many_bad_requests_at_once_leave_the_server_well(server: httpx.Client) -> None:
    statuses: list[int] = []

    def send() -> None:
        for body, content_type, _ in BODIES:
            answered = httpx.post(
                server.base_url.join(CHAT),
                content=body,
                headers={"content-type": content_type},
                timeout=30,
            )
            statuses.append(answered.status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 4 * len(BODIES)
    assert set(statuses) == {400, 415}
    _check_healthy(server)
