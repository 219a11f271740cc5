"""What a user reads who wrote a field wrong: its path, what was found, what would work."""

import json
import time
from typing import Any

import pytest
from support_engine import FakeEngine
from support_http import client_of

USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"messages": [USER]}
MESSAGES: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [USER]}
RESPONSES: dict[str, Any] = {"input": "hi"}
BODIES = {"/v1/chat/completions": CHAT, "/v1/messages": MESSAGES, "/v1/responses": RESPONSES}


def _message(path: str, body: Any) -> str:
    with client_of(FakeEngine()) as client:
        text = body if isinstance(body, str) else json.dumps(body)
        answered = client.post(path, content=text, headers={"content-type": "application/json"})
    assert answered.status_code == 400
    error = answered.json()["error"]
    if path != "/v1/messages" and error["param"] is not None:
        assert error["message"].startswith(error["param"])
    message: str = error["message"]
    return message


def _content(block: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [block]}]}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/v1/chat/completions", {"messages": "hi"}, "messages: expected an array, got a string"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "king", "content": ""}]},
            "messages[0].role: 'king' is not 'assistant', 'developer', 'system', 'tool' or 'user'",
        ),
        ("/v1/chat/completions", {"messages": [{}]}, "messages[0].role: is missing"),
        (
            "/v1/chat/completions",
            _content({"type": "words"}),
            "messages[0].content[0].type: 'words' is not 'text', 'refusal' or 'image_url'",
        ),
        (
            "/v1/chat/completions",
            {"max_tokens": 5.5},
            "max_tokens: expected an integer or null, got a decimal number",
        ),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens: expected an integer >= 1"),
        ("/v1/chat/completions", {"temperature": 3}, "temperature: expected a number <= 2"),
        ("/v1/chat/completions", {"n": 9}, "n: expected an integer <= 8"),
        ("/v1/chat/completions", {"stream": "yes"}, "stream: expected a boolean or null, got a string"),
        (
            "/v1/chat/completions",
            {"tool_choice": "always"},
            "tool_choice: 'always' is not 'auto', 'none', 'required' or an object",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}]},
            "messages[0].content: is missing; a user message needs content",
        ),
        ("/v1/messages", {"max_tokens": None}, "max_tokens: expected an integer, got null"),
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json"}}},
            "output_config.format.type: 'json' is not 'json_schema'",
        ),
        (
            "/v1/messages",
            _content({"type": "image", "source": {"type": "file"}}),
            "messages[0].content[0].source.type: 'file' is not 'base64' or 'url'",
        ),
        (
            "/v1/messages",
            _content({"type": "document", "source": {"type": "file"}}),
            "messages[0].content[0].source.type: 'file' is not 'text'",
        ),
        (
            "/v1/responses",
            {"reasoning": {"effort": "extreme"}},
            "reasoning.effort: 'extreme' is not 'high', 'low', 'max', 'medium', 'minimal', 'none' or 'xhigh'",
        ),
        ("/v1/responses", {"metadata": {"a": 5}}, "metadata[...]: expected a string, got an integer"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_work(path: str, fields: Any, message: str) -> None:
    assert _message(path, {**BODIES[path], **fields}) == message


@pytest.mark.parametrize("number", ["1e99", "1" + "0" * 40, "2147483648"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "max_tokens"),
        ("/v1/chat/completions", "max_completion_tokens"),
        ("/v1/chat/completions", "top_k"),
        ("/v1/messages", "max_tokens"),
        ("/v1/messages", "top_k"),
        ("/v1/messages", "thinking.budget_tokens"),
        ("/v1/responses", "max_output_tokens"),
    ],
)
def test_an_absurd_number_is_refused_with_the_bound(path: str, field: str, number: str) -> None:
    outer, _, inner = field.partition(".")
    value = {"type": "enabled", inner: "NUMBER"} if inner else "NUMBER"
    body = json.dumps({**BODIES[path], outer: value}).replace('"NUMBER"', number)
    assert _message(path, body) == f"{field}: expected an integer <= 2147483647"


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_is_no_object_says_so(path: str) -> None:
    assert _message(path, []) == "the body: expected an object, got an array"


def test_a_missing_field_of_the_body_is_named() -> None:
    assert _message("/v1/chat/completions", {}) == "messages: is missing"
    assert _message("/v1/messages", {"model": "m"}).endswith(": is missing")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"max_tokens": 5.0, "n": 2.0, "top_k": 4e1}),
        ("/v1/messages", {"max_tokens": 5.0, "top_k": 40.0}),
        ("/v1/responses", {"max_output_tokens": 5.0}),
    ],
)
def test_a_number_without_a_fraction_is_an_integer(path: str, fields: dict[str, Any]) -> None:
    engine = FakeEngine()
    with client_of(engine) as client:
        answered = client.post(path, json={**BODIES[path], **fields, "temperature": 1.0})
    assert answered.status_code == 200
    assert engine.requests[0].max_tokens == 5
    assert isinstance(engine.requests[0].max_tokens, int)


def test_many_numbers_that_are_no_integers_are_refused_at_once() -> None:
    began = time.monotonic()
    with client_of(FakeEngine()) as client:
        answered = client.post("/v1/completions", json={"prompt": [1.0] * 50_000})
    assert answered.status_code == 400
    assert answered.json()["error"]["param"].startswith("prompt[")
    assert time.monotonic() - began < 10


def test_a_bound_holds_for_a_number_without_a_fraction_too() -> None:
    body = {**CHAT, "max_tokens": 5.0, "n": 9.0, "messages": [{"role": "user", "content": "1.5"}]}
    assert _message("/v1/chat/completions", body) == "n: expected an integer <= 8"
