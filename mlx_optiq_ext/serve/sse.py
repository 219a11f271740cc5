"""Answers to requests that generate: server-sent events while the engine works, or one document at the end.

The engine accepts a request before anything is sent, so a refusal is a real 4xx; then headers and the first
event leave at once, before prefill. A stream that has to wait for its model gets its headers after some
seconds, and comments meanwhile. A client that leaves cancels its jobs, streaming or not. Knows no dialect:
each gives an :class:`EventWriter` and a :class:`Collector`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Receive, Scope, Send

from mlx_optiq_ext.serve.access_log import CLIENT_LEFT, PrefillLog, log_start
from mlx_optiq_ext.serve.account import Account
from mlx_optiq_ext.serve.errors import problem_of
from mlx_optiq_ext.serve.run import Run
from mlx_optiq_ext.types.events import Accepted, Event, Failed

__all__ = [
    "ClientLeft",
    "Collector",
    "EventWriter",
    "StreamCollector",
    "answer_whole",
    "sse_event",
    "stream_answer",
    "until_left",
]

T = TypeVar("T")

HEARTBEAT_S = 1.0
HEADERS_S = 5.0
"""How long a stream may go without headers; a refusal that takes longer is told in the stream."""
_WAITING = b": waiting for the model\n\n"
_LAST_EVENTS_S = 2.0
"""How long a row may take to leave, until its request is logged without the tokens it took."""
_LINE_ENDS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}
_log = logging.getLogger(__name__)


class ClientLeft(HTTPException):
    """The client closed its connection before the answer was complete; nobody is told."""

    status_code = CLIENT_LEFT

    def __init__(self) -> None:
        # Without words Litestar would look for those of the status, which has none.
        super().__init__("the client closed the connection before the answer was complete")


class EventWriter(Protocol):
    """Renders the events of one answer (or of several, told apart by ``choice``) as a dialect's stream."""

    def first(self, accepted: Accepted) -> bytes:
        """What is sent with the headers, before prefill."""

    def feed(self, event: Event, choice: int) -> bytes:
        """What an event adds; empty for nothing. After the last ``Finished`` it ends the stream."""

    def heartbeat(self) -> bytes:
        """What shows during a second without other output that the server is alive."""

    def failed(self, failed: Failed) -> bytes:
        """The error that ends a stream in the middle."""


class Collector(Protocol):
    """Gathers the same events into one document."""

    def first(self, accepted: Accepted) -> None:
        """Begin."""

    def feed(self, event: Event, choice: int) -> None:
        """Take an event."""

    def answer(self) -> Any:
        """The document, as msgspec writes it."""


class StreamCollector:
    """A :class:`Collector` of what a stream writer keeps anyway.

    Args:
        stream: Fed with the events; what it writes is dropped.
        answer: The document, when all is done.
    """

    def __init__(self, stream: EventWriter, answer: Callable[[], Any]) -> None:
        self._stream = stream
        self.answer = answer

    def first(self, accepted: Accepted) -> None:
        """Begin."""
        self._stream.first(accepted)

    def feed(self, event: Event, choice: int) -> None:
        """Take an event."""
        self._stream.feed(event, choice)


def sse_event(name: str | None, data: Any) -> bytes:
    """One event: with an ``event:`` line where it has a name, and the data as JSON in one line.

    Other line ends of Unicode are escaped: clients that split on any of them would tear the event apart.
    """
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    line = msgspec.json.encode(data)
    for line_end, escaped in _LINE_ENDS.items():
        line = line.replace(line_end, escaped)
    return head + b"data: " + line + b"\n\n"


def stream_answer(run: Run, writer: EventWriter) -> ASGIApp:
    """Answer with server-sent events; to be returned by a route declared ``-> ASGIApp``.

    Raises:
        JobFailed: When it is sent: the engine refuses the request, and nothing has been sent.
        OptiqError: The same, where the engine refuses at once.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        account = Account.of(scope)

        async def work() -> None:
            async with run:
                accepted = await _begun(run, writer, send, account)
                if accepted is not None:
                    await _send_more(send, writer.first(accepted))
                    await _send_events(run, writer, send, account)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await _unless_left(receive, work(), run, account)

    return app


def answer_whole(run: Run, collector: Collector) -> ASGIApp:
    """Answer with one document when all is done; to be returned by a route declared ``-> ASGIApp``.

    Raises:
        JobFailed: When it is sent: the engine refused the request or lost it.
        OptiqError: The same, where the engine refuses at once.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        account = Account.of(scope)

        async def work() -> bytes:
            async with run:
                collector.first(await _accepted(run, account))
                prefill = PrefillLog(account)
                async for told in run.events():
                    if told is not None:
                        index, event = told
                        account.see(event)
                        prefill.see(event)
                        collector.feed(event, index)
            return msgspec.json.encode(collector.answer())

        body = await _unless_left(receive, work(), run, account)
        if body is not None:
            await send(_start("application/json", {"content-length": str(len(body))}))
            await send({"type": "http.response.body", "body": body, "more_body": False})

    return app


async def until_left(request: Request[Any, Any, Any], future: "Future[T]") -> T:
    """Wait for something of the engine; cancel it when the client leaves.

    Raises:
        ClientLeft: It did.
    """

    async def result() -> T:
        return await asyncio.wrap_future(future)

    try:
        return await _until_left(request.receive, result())
    except ClientLeft:
        Account.of(request.scope).leave()
        raise


async def _accepted(run: Run, account: Account) -> Accepted:
    """Wait until all answers are accepted, and log that they start; the first of them."""
    account.jobs = run.jobs
    accepted = await run.accepted()
    for each in accepted:
        account.see(each)
    log_start(account)
    return accepted[0]


async def _begun(run: Run, writer: EventWriter, send: Send, account: Account) -> Accepted | None:
    """Send the headers when the request is accepted, or when that takes long; None: refused after them."""
    start = _start("text/event-stream; charset=utf-8", {"cache-control": "no-cache"})
    accepting = asyncio.ensure_future(_accepted(run, account))
    try:
        await asyncio.wait((accepting,), timeout=HEADERS_S)
        if accepting.done():
            accepting.result()
            await send(start)
        else:
            await send(start)
            while not accepting.done():
                await _send_more(send, _WAITING)
                await asyncio.wait((accepting,), timeout=HEARTBEAT_S)
    finally:
        accepting.cancel()
    try:
        return accepting.result()
    except Exception as error:  # noqa: BLE001 - a border: headers are out, so the stream itself tells
        await _tell(error, writer, send, account)
        return None


async def _send_events(run: Run, writer: EventWriter, send: Send, account: Account) -> None:
    sent, prefill = time.monotonic(), PrefillLog(account)
    try:
        async for told in run.events(HEARTBEAT_S):
            chunk = b""
            if told is not None:
                index, event = told
                account.see(event)
                prefill.see(event)
                chunk = writer.feed(event, index)
            if not chunk and time.monotonic() - sent >= HEARTBEAT_S:
                chunk = writer.heartbeat()
            if chunk:
                sent = time.monotonic()
                await _send_more(send, chunk)
    except Exception as error:  # noqa: BLE001 - a border: headers are out, so the stream itself tells
        await _tell(error, writer, send, account)


async def _tell(error: Exception, writer: EventWriter, send: Send, account: Account) -> None:
    """End the stream with an error."""
    problem = problem_of(error)
    account.see(problem)
    await _send_more(send, writer.failed(problem))


async def _unless_left(
    receive: Receive, work: Coroutine[Any, Any, T], run: Run, account: Account
) -> T | None:
    try:
        return await _until_left(receive, work)
    except ClientLeft:
        account.leave()
        for event in await run.last_events(_LAST_EVENTS_S):
            account.see(event)
        return None


async def _until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Return when the client has closed its connection; the request's body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(media_type: str, headers: Mapping[str, str]) -> Any:
    pairs = {"content-type": media_type, **headers}
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()
        ],
    }


def _send_more(send: Send, chunk: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": chunk, "more_body": True})
