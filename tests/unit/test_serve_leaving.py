"""Clients that leave, heads that never end, and a server that is told to stop, on a real socket."""

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
BODIES = {
    b"/v1/completions": b'{"prompt":"hi","stream":%s}',
    b"/v1/responses": b'{"input":"hi","stream":%s}',
    b"/v1/messages": (
        b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"hi"}],"stream":%s}'
    ),
    b"/v1/messages/count_tokens": (b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":%s}'),
}
BODY = b'{"messages":[{"role":"user","content":"hi"}],"stream":%s}'


def _access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mlx_optiq_ext.access"]


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


def _post(port: int, stream: bool, path: bytes = b"/v1/chat/completions") -> socket.socket:
    body = (BODIES.get(path) or BODY) % (b"true" if stream else b"false")
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % path
    client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    return client


def _read_until(client: socket.socket, words: bytes) -> bytes:
    received = b""
    while words not in received:
        piece = client.recv(65536)
        assert piece, received
        received += piece
    return received


def _rest(client: socket.socket) -> bytes:
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_job_and_is_logged_once(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeEngine(_endless(Until()))
    with _running(engine) as (_, port):
        client = _post(port, stream)
        if stream:
            _read_until(client, b'"content":"a"')
        else:
            _until(lambda: len(engine.requests) == 1)
            time.sleep(0.1)
        client.close()
        _until(lambda: engine.ended == ["job1"])
        _until(lambda: " 499 " in caplog.text)
        assert engine.cancelled == ["job1"]
    ends = [line for line in _access_lines(caplog) if " started " not in line]
    assert len(ends) == 1
    assert " 499 model=org/tiny prompt=100 cached=0 out=1 " in ends[0]
    assert "Traceback" not in caplog.text


def test_a_client_that_leaves_while_its_tokens_are_counted_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Slow(FakeEngine):
        def count_tokens(self, request: Generation) -> Future[int]:
            self.requests.append(request)
            return Future()

    caplog.set_level(logging.INFO)
    engine = Slow()
    with _running(engine) as (_, port):
        client = _post(port, False, b"/v1/messages/count_tokens")
        _until(lambda: len(engine.requests) == 1)
        client.close()
        _until(lambda: " 499 " in caplog.text)
    assert len(_access_lines(caplog)) == 1
    assert "Traceback" not in caplog.text


def test_a_client_that_leaves_while_it_asks_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with _running(FakeEngine()) as (_, port):
        client = socket.create_connection(("127.0.0.1", port), timeout=10)
        client.sendall(UNFINISHED)
        time.sleep(0.1)
        client.close()
        _until(lambda: " 499 " in caplog.text)
    assert len(_access_lines(caplog)) == 1
    assert "Traceback" not in caplog.text


CUT = {
    b"/v1/chat/completions": (b'data: {"error":{"message":"the server is stopping"', b""),
    b"/v1/completions": (b'data: {"error":{"message":"the server is stopping"', b""),
    b"/v1/messages": (b"event: error\n", b'"message":"the server is stopping"'),
    b"/v1/responses": (b"event: response.failed\n", b'"message":"the server is stopping"'),
}


@pytest.mark.parametrize("path", CUT)
def test_streams_that_are_cut_by_a_second_stop_end_with_an_error_event(
    path: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(_endless(Until()))
    with _running(engine, drain_s=60.0) as (server, port):
        client, whole = _post(port, True, path), _post(port, False, path)
        _read_until(client, b'"a"')
        _until(lambda: len(engine.requests) == 2)
        server.stop()
        _until(lambda: engine.now.state == "draining")
        server.stop()
        received, refused = _rest(client), _rest(whole)
    for words in CUT[path]:
        assert words in received
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"the server is stopping" in refused
    ends = [line for line in _access_lines(caplog) if " started " not in line]
    assert len(ends) == 2
    assert all(" 503 model=" in line and " prompt=100 cached=0 out=1 " in line for line in ends)
    assert all(line.endswith("EngineStopped: the server is stopping") for line in ends)
    assert "Traceback" not in caplog.text


def test_streams_that_outlast_the_drain_end_with_an_error_event() -> None:
    engine = FakeEngine(_endless(Until()))
    with _running(engine, drain_s=0.3) as (server, port):
        client = _post(port, stream=True)
        _read_until(client, b'"content":"a"')
        server.stop()
        assert b'data: {"error":' in _rest(client)


def test_headers_and_first_event_leave_before_prefill() -> None:
    engine = FakeEngine(_endless(Until(), first=False))
    with _running(engine) as (_, port):
        client = _post(port, stream=True)
        received = _read_until(client, b'"role":"assistant"')
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
    told: list[tuple[str, ...]] = []
    assert run_server(create_app(engine, options, None), engine, options, on_listening=told.append) == 6
    ((url,),) = told
    assert url.startswith("http://127.0.0.1:")
    assert engine.called == ["close"]


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_the_first_url_is_reachable_from_this_machine(host: str, reached: str) -> None:
    engine = FakeEngine()
    options = ServeOptions(port=0, host=host)
    told: list[tuple[str, ...]] = []
    server = Server(create_app(engine, options, "key"), engine, options, told.append)
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    _until(lambda: bool(told))
    port = server.port
    assert told[0][0] == f"http://{reached}:{port}"
    assert told[0][1:] == ((f"http://{socket.gethostname()}:{port}",) if host == "0.0.0.0" else ())
    for name in (f"{reached}:{port}", f"{socket.gethostname()}:{port}")[: len(told[0])]:
        connection = http.client.HTTPConnection(reached, port, timeout=10)
        connection.request("GET", "/v1/models", headers={"host": name, "x-api-key": "key"})
        assert connection.getresponse().status == 200
        connection.close()
    server.stop()
    thread.join(20)


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
