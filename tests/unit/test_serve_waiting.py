"""A stream whose model has to be loaded first, or waits for the memory of another one."""

import time
from typing import Any

import pytest
from litestar.testing import TestClient
from support_engine import FakeEngine, answer

from mlx_optiq_ext.errors import EngineError
from mlx_optiq_ext.serve import sse
from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, EventSink, Failed
from mlx_optiq_ext.types.serve import ServeOptions

MESSAGES = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": MESSAGES},
    "/v1/responses": {"input": "Hi"},
}
DIALECTS = pytest.mark.parametrize("path", ASKED)


class _Loading(FakeEngine):
    """Tells nothing of a request for a while."""

    def submit(self, request: Generation, deliver: EventSink) -> str:
        told: list[Event] = []

        def late(event: Event) -> None:
            if not told:
                time.sleep(0.4)
            told.append(event)
            deliver(event)

        return super().submit(request, late)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEADERS_S", 0.05)
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.05)


def _stream(engine: FakeEngine, path: str) -> tuple[int, str]:
    app = create_app(engine, ServeOptions(), None)
    with TestClient(app, base_url="http://127.0.0.1:8080") as client:
        answered = client.post(path, json={**ASKED[path], "stream": True})
        return answered.status_code, answered.text


@DIALECTS
def test_it_shows_that_it_waits_and_then_answers_as_ever(path: str) -> None:
    status, waited = _stream(_Loading(answer("Hello")), path)
    assert status == 200
    assert waited.startswith(": waiting for the model\n\n")
    status, at_once = _stream(FakeEngine(answer("Hello")), path)
    events = [line for line in waited.splitlines() if line.startswith("event: ")]
    assert events == [line for line in at_once.splitlines() if line.startswith("event: ")]
    assert "Hello" in waited
    assert waited.count(": waiting") >= 3


@DIALECTS
def test_a_late_refusal_ends_the_stream_with_an_error(path: str) -> None:
    def refuse(_: Generation) -> list[Event]:
        return [Failed.of(EngineError("m cannot be opened"))]

    status, text = _stream(_Loading(refuse), path)
    assert status == 200
    assert "m cannot be opened" in text.rpartition(": waiting")[2]
    assert text.count("m cannot be opened") == 1


@DIALECTS
def test_an_early_refusal_is_a_status(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEADERS_S", 5.0)

    def refuse(_: Generation) -> list[Event]:
        return [Failed.of(EngineError("m cannot be opened"))]

    status, text = _stream(FakeEngine(refuse), path)
    assert status == 503
    assert "m cannot be opened" in text
