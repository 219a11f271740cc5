"""The access log: who asked for what, how it went and why not, without contents."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from support_engine import FakeEngine, answer
from support_http import client_of

from mlx_optiq_ext.errors import Overloaded
from mlx_optiq_ext.serve import access_log
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, Failed, Started, TextDelta

HELLO = {"messages": [{"role": "user", "content": "private words"}]}


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_optiq_ext.access")


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without the ids, which differ."""
    lines = [record.getMessage() for record in caplog.records if record.name == "mlx_optiq_ext.access"]
    assert all(re.match(r"req_[0-9a-f]{12} ", line) for line in lines)
    return [line.split(" ", 1)[1] for line in lines]


def test_a_request_that_generates_is_a_line_at_its_start_and_one_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with client_of(FakeEngine()) as client:
        client.post(
            "/v1/chat/completions", json={**HELLO, "user": "private"}, headers={"x-api-key": "private"}
        )
    begin, end = _lines(caplog)
    assert begin == "POST /v1/chat/completions started dialect=openai model=org/tiny prompt=100 job=job1"
    assert re.fullmatch(
        r"POST /v1/chat/completions 200 model=org/tiny prompt=100 cached=64 out=12 "
        r"first=\d+\.\d{3}s total=\d+\.\d{3}s",
        end,
    )
    assert "private" not in caplog.text


def test_other_requests_are_one_line_and_those_of_machines_none(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(FakeEngine()) as client:
        client.get("/v1/models")
        client.get("/health")
        client.get("/optiq/clients")
    (line,) = _lines(caplog)
    assert re.fullmatch(r"GET /v1/models 200 total=\d+\.\d{3}s", line)


def test_a_refusal_is_one_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(FakeEngine()) as client:
        answered = client.get("/v1/models/a%0Ab")
        client.post("/v1/messages", json={"model": "m", "max_tokens": "many", **HELLO})
        client.get("/v1/models", headers={"host": "evil.example"})
        client.get("/nothing")
    one, two, three, four = _lines(caplog)
    assert " 404 total=" in four
    assert "s NotFound: there is nothing at this path" in four
    assert one.startswith("GET /v1/models/a\\nb 404 total=")
    assert one.endswith(" UnknownName: no model 'a\\\\nb'; there are: org/tiny, org/tiny@terse, other")
    assert two.startswith("POST /v1/messages 400 total=")
    assert " RequestError: " in two
    assert "max_tokens" in two
    assert " 403 total=" in three
    assert " Forbidden: " in three
    assert answered.headers["x-request-id"] in caplog.text
    assert "private" not in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_fails_in_the_middle_says_what_was_generated(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request: Generation) -> Iterator[Event]:
        yield Started(cached_tokens=7)
        yield TextDelta(text="private")
        yield Failed(kind="Overloaded", message="no memory", status=Overloaded.status, completion_tokens=5)

    with client_of(FakeEngine(script)) as client:
        client.post("/v1/messages", json={**HELLO, "model": "m", "max_tokens": 9, "stream": stream})
    _, end = _lines(caplog)
    assert end.startswith("POST /v1/messages 529 model=m prompt=100 cached=7 out=5 first=")
    assert end.endswith("s Overloaded: no memory")
    assert "private" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_prompt_says_how_far_it_is(
    stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_PREFILL_EVERY_S", 0.0)
    with client_of(FakeEngine(answer("a"))) as client:
        client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
    lines = _lines(caplog)
    assert [line.split(" after ")[0] for line in lines[1:-1]] == [
        "POST /v1/chat/completions prefill 80/100",
        "POST /v1/chat/completions prefill 100/100",
    ]


def test_a_line_stays_short(caplog: pytest.LogCaptureFixture) -> None:
    body: dict[str, Any] = {**HELLO, "reasoning_effort": "x" * 5000}
    with client_of(FakeEngine()) as client:
        client.get("/v1/models/" + "y" * 5000)
        client.post("/v1/chat/completions", json=body)
    assert all(len(line) < 700 for line in _lines(caplog))


def test_a_client_is_told_the_id_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(FakeEngine()) as client:
        theirs = client.post("/v1/messages", json={"model": "m"})
        ours = client.post("/v1/chat/completions", json={**HELLO, "stream": True})
    assert theirs.json()["request_id"] == theirs.headers["request-id"]
    assert caplog.records[0].getMessage().startswith(theirs.headers["request-id"])
    assert caplog.records[-1].getMessage().startswith(ours.headers["x-request-id"])
