"""Every recorded request of the real clients is accepted, and its stream comes in a valid order.

The recordings are reduced to structure: long strings are cut, schemas keep two properties.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from clients.event_order import check_chat, check_messages, check_responses
from support_engine import FakeEngine, Script, answer, call
from support_http import client_of, events_of

from mlx_optiq_ext.engine.render_turns import hoist_system
from mlx_optiq_ext.types.chat import Generation

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))
CHECKS = {
    "/v1/messages": check_messages,
    "/v1/responses": check_responses,
    "/v1/chat/completions": check_chat,
}
ANSWERS: dict[str, Script] = {
    "text": answer("PLAIN", "-ANSWER"),
    "thought and call": answer(
        "I look.", *call("Bash", '{"command":', '"ls"}'), reasoning="hm", reason="tool_calls"
    ),
}


def exchanges(method: str) -> list[Any]:
    found = []
    for path in RECORDINGS:
        for number, exchange in enumerate(json.loads(path.read_text(encoding="utf-8"))["requests"]):
            if exchange["method"] == method:
                found.append(pytest.param(exchange, id=f"{path.stem}-{number}"))
    return found


def test_all_recordings_are_here() -> None:
    assert len(RECORDINGS) == 44


@pytest.mark.parametrize("script", ANSWERS)
@pytest.mark.parametrize("exchange", exchanges("POST"))
def test_a_recorded_request_gets_a_valid_answer(exchange: dict[str, Any], script: str) -> None:
    engine = FakeEngine(ANSWERS[script])
    with client_of(engine) as client:
        answered = client.post(exchange["path"], json=exchange["body"], headers=exchange["headers"])
    path = exchange["path"].partition("?")[0]
    assert answered.status_code == exchange["status"], answered.text
    if answered.status_code == 200:
        check_asked(engine.requests[0], exchange["body"])
    if exchange["body"].get("stream"):
        CHECKS[path](events_of(answered.text))
    elif answered.status_code == 400:
        assert answered.json()["error"]["details"]["error_code"] == "thread_unsupported_request"


@pytest.mark.parametrize("exchange", exchanges("GET"))
def test_a_recorded_probe_gets_the_recorded_status(exchange: dict[str, Any]) -> None:
    """Models are listed and found by encoded names; the probes for other servers find nothing."""
    path = exchange["path"].replace("org%2Fname", "org%2Ftiny")
    with client_of(FakeEngine()) as client:
        answered = client.get(path, headers=exchange["headers"])
    assert answered.status_code == exchange["status"], answered.text
    assert "error" in answered.json() or answered.json()["object"] in ("list", "model")


def check_asked(asked: Generation, body: dict[str, Any]) -> None:
    """Nothing that a client said is lost on the way to the engine."""
    written = repr(asked)
    for turn in body.get("messages") or body.get("input") or ():
        for text in texts_of(turn):
            if not text.startswith("x-anthropic-billing-header"):
                assert repr(text)[1:-1] in written
    names = {tool.name for tool in asked.tools}
    for tool in body.get("tools") or ():
        name = tool.get("name") or tool.get("function", {}).get("name")
        if tool.get("type") in (None, "function") and name != "DeferredToolPlaceholder":
            assert name in names


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["text"]] if isinstance(value.get("text"), str) else []
        content = value.get("content")
        own += [content] if isinstance(content, str) else []
        return own + [
            text for each in value.values() if isinstance(each, dict | list) for text in texts_of(each)
        ]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else []


def test_two_sessions_of_one_project_share_their_head() -> None:
    """The per-conversation billing line and the place of the environment do not reach the prompt."""
    path = next(path for path in RECORDINGS if path.stem == "claude_code__plain")
    body = json.loads(path.read_text(encoding="utf-8"))["requests"][0]["body"]
    changed = json.loads(json.dumps(body).replace("cc_version=0.0.0.abc", "cc_version=0.0.0.def"))
    changed["messages"][0]["content"][-1]["text"] = "another task"
    engine = FakeEngine()
    with client_of(engine) as client:
        for each in (body, changed):
            client.post("/v1/messages", json={**each, "stream": False})
    first, second = engine.requests
    assert first.tools == second.tools
    head, other = (hoist_system(each.messages)[0] for each in engine.requests)
    assert head == other
    assert head.role == "system"
    assert "# Environment" in repr(head)
