"""Clients that leave, heads that never end, and a server that is told to stop, on a real socket."""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
from support_engine import FakeEngine, Until, answer, ready_status

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.serve.run_server import Server, run_server
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, Started, TextDelta
from mlx_optiq_ext.types.serve import ServeOptions

UNFINISHED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    b"content-length: 9\r\n\r\n{"
)
BODY = b'{"messages":[{"role":"user","content":"hi"}],"stream":%s}'


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def _endless(go: Until, first: bool = True) -> Callable[[Generation], Iterator[Event | Until]]:
    def script(request: Generation) -> Iterator[Event | Until]:
        yield Started(cached_tokens=0)
        if first:
            yield TextDelta(text="a")
        yield go
        yield from list(answer("end")(request))[1:]  # type: ignore[misc]

    return script


@contextmanager
def _running(engine: FakeEngine, **options: float) -> Iterator[tuple[Server, int]]:
    given = ServeOptions(port=0, **options)  # type: ignore[arg-type]
    listening = threading.Event()
    server = Server(create_app(engine, given, None), engine, given, lambda url: listening.set())
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    assert listening.wait(20)
    try:
        yield server, server.port
    finally:
        server.stop()
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def _post(port: int, stream: bool) -> socket.socket:
    body = BODY % (b"true" if stream else b"false")
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_job(stream: bool) -> None:
    engine = FakeEngine(_endless(Until()))
    with _running(engine) as (_, port):
        client = _post(port, stream)
        if stream:
            received = b""
            while b'"content":"a"' not in received:
                received += client.recv(65536)
        else:
            _until(lambda: len(engine.requests) == 1)
        client.close()
        _until(lambda: engine.ended == ["job1"])
        assert engine.cancelled == ["job1"]


def test_headers_and_first_event_leave_before_prefill() -> None:
    engine = FakeEngine(_endless(Until(), first=False))
    with _running(engine) as (_, port):
        client = _post(port, stream=True)
        received = b""
        while b'"role":"assistant"' not in received:
            received += client.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        client.close()


def test_stopping_lets_running_answers_end_and_refuses_new_ones() -> None:
    go = Until()
    engine = FakeEngine(_endless(go))
    with _running(engine, drain_s=10.0) as (server, port):
        client = _post(port, stream=True)
        received = client.recv(65536)
        server.stop()
        _until(lambda: engine.now.state == "draining")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request(
            "POST", "/v1/chat/completions", BODY % b"false", {"content-type": "application/json"}
        )
        refused = connection.getresponse()
        assert (refused.status, refused.getheader("retry-after")) == (503, "3")
        connection.close()
        go.go.set()
        while b"[DONE]" not in received:
            piece = client.recv(65536)
            assert piece, received
            received += piece
        client.close()
    assert engine.called == ["close"]
    assert engine.cancelled == []


def test_a_failed_engine_ends_the_process_with_its_code() -> None:
    engine = FakeEngine(status=ready_status(state="failed"))
    options = ServeOptions(port=0)
    urls: list[str] = []
    assert run_server(create_app(engine, options, None), engine, options, on_listening=urls.append) == 6
    assert urls[0].startswith("http://127.0.0.1:")
    assert engine.called == ["close"]


def test_a_taken_port_is_named() -> None:
    engine = FakeEngine()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ServeOptions(port=taken.getsockname()[1])
        with pytest.raises(UsageError, match="cannot listen on"):
            run_server(create_app(engine, options, None), engine, options, on_listening=lambda url: None)
    assert engine.called == ["close"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 400_000, b"431"),
        (b"GET /" + b"a" * 400_000, b"431"),
        (b"GET / HTTP/1.1\r\nhost: loc", b"408"),
        (b"", b"408"),
        (
            UNFINISHED,
            b"408",
        ),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)
def test_requests_that_never_end_are_ended(sent: bytes, status: bytes) -> None:
    with _running(FakeEngine(), timeout_s=0.3) as (_, port):
        client = socket.create_connection(("127.0.0.1", port), timeout=10)
        try:
            client.sendall(sent)
        except OSError:
            assert status == b"431"
        answered = client.recv(65536)
        assert answered.split(b" ")[1] == status
        client.close()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert msgspec.json.decode(connection.getresponse().read())["status"] == "ready"
        connection.close()
