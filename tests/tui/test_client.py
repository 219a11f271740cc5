"""The dashboard's client against a real server, a server that goes away, and one that is none."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import httpx
import pytest
from support_engine import FakeEngine, answer, call
from support_http import live

from mlx_optiq_ext.errors import EngineError, RequestError, Unauthorized, UsageError
from mlx_optiq_ext.types.events import Failed
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.chat_stream import ChatDelta, ChatUsage, ServerEvent, ToolCallPart, server_events
from mlx_optiq_tui.client import Lost, ServerClient

T = TypeVar("T")

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def _answered(client: ServerClient) -> list[ChatDelta]:
    return [delta async for delta in client.chat(BODY)]


def _transported(handler: Any) -> ServerClient:
    return ServerClient(
        "http://test", key="secret", transport=httpx.MockTransport(handler), first_wait_s=0.01
    )


def test_an_answer_comes_in_pieces_with_reasoning_calls_and_usage() -> None:
    engine = FakeEngine(answer("Hel", "lo", *call("look", '{"a":', "1}"), reasoning="why"))
    with live(engine) as url:
        deltas = _run(_answered(ServerClient(url)))
    assert "".join(delta.text for delta in deltas) == "Hello"
    assert "".join(delta.reasoning for delta in deltas) == "why"
    parts = [part for delta in deltas for part in delta.tool_calls]
    assert parts[0].name == "look"
    assert "".join(part.arguments for part in parts) == '{"a":1}'
    assert deltas[-1].usage == ChatUsage(
        prompt_tokens=100, completion_tokens=12, cached_tokens=64, reasoning_tokens=4
    )
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert isinstance(parts[0], ToolCallPart)


def test_leaving_an_answer_cancels_it_on_the_server() -> None:
    def endless(request: Any) -> Any:
        yield from answer("a")(request)

    engine = FakeEngine(lambda request: (piece for piece in (*list(endless(request))[:-1], 60.0)))

    async def leave(client: ServerClient) -> None:
        stream = client.chat(BODY)
        async for delta in stream:
            if delta.text:
                break
        await stream.aclose()
        for _ in range(200):
            if engine.cancelled:
                return
            await asyncio.sleep(0.02)

    with live(engine) as url:
        _run(leave(ServerClient(url)))
    assert engine.cancelled


def test_an_error_in_the_middle_of_an_answer_is_told_in_the_servers_words() -> None:
    failed = Failed(status=500, kind="InternalError", message="the row broke")
    script = answer("Hel")
    engine = FakeEngine(lambda request: (*list(script(request))[:-1], failed))
    with live(engine) as url, pytest.raises(RequestError, match="the row broke"):
        _run(_answered(ServerClient(url)))


def test_refusals_are_told_in_the_servers_words() -> None:
    with live(FakeEngine()) as url:
        client = ServerClient(url)
        with pytest.raises(RequestError, match="there is nothing at this path"):
            _run(client.ask("GET", "/nowhere", kind=dict))
    refuse = _transported(
        lambda _: httpx.Response(401, json={"error": {"message": "this server needs a key"}})
    )
    with pytest.raises(Unauthorized, match="wants its key: give it in OPTIQ_API_KEY"):
        _run(refuse.status())


def test_adapters_are_switched_by_quoted_names() -> None:
    engine = FakeEngine()
    with live(engine) as url:
        client = ServerClient(url)

        async def switch() -> None:
            await client.unmount("a b?", "m")
            await client.use(None)

        _run(switch())
    assert engine.called == ["unmount a b? m", "use None"]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (httpx.Response(200, text="<html>"), "is not an optiq server of this version"),
        (httpx.Response(502, text="bad gateway"), "answered 502; is it an optiq server"),
    ],
)
def test_what_is_no_optiq_server_is_said(response: httpx.Response, words: str) -> None:
    with pytest.raises((EngineError, RequestError), match=words):
        _run(_transported(lambda _: response).status())


def test_a_server_that_goes_away_is_told_and_followed_again() -> None:
    turns = iter(["up", "down", "down", "up"])

    def handler(request: httpx.Request) -> httpx.Response:
        if next(turns) == "down":
            raise httpx.ConnectError("refused", request=request)
        status = b'{"state":"ready","version":"0","uptime_s":1,"models":[]}'
        return httpx.Response(200, content=b"event: status\ndata: " + status + b"\n\n")

    async def news() -> list[EngineStatus | Lost]:
        told: list[EngineStatus | Lost] = []
        async for each in _transported(handler).follow_status():
            told.append(each)
            if len(told) == 5:
                break
        return told

    told = _run(news())
    assert [type(each).__name__ for each in told] == ["EngineStatus", "Lost", "Lost", "Lost", "EngineStatus"]
    lost = [each for each in told if isinstance(each, Lost)]
    assert [each.retry_s for each in lost] == [0.01, 0.02, 0.04]
    assert "refused" in lost[1].reason


def test_each_line_of_the_log_comes_once_over_reconnections() -> None:
    lines = [b'{"number":%d,"time":%d,"level":"INFO","text":"t"}' % pair for pair in ((1, 5), (2, 6), (1, 9))]
    answers = iter([lines[:1], lines[:2], lines[2:]])

    def handler(_: httpx.Request) -> httpx.Response:
        content = b"".join(b"event: line\ndata: " + line + b"\n\n" for line in next(answers))
        return httpx.Response(200, content=content)

    async def log() -> list[tuple[int, float]]:
        told: list[tuple[int, float]] = []
        async for line in _transported(handler).follow_log():
            told.append((line.number, line.time))
            if len(told) == 3:
                break
        return told

    assert _run(log()) == [(1, 5.0), (2, 6.0), (1, 9.0)]


def test_events_are_read_with_comments_and_several_lines_of_data() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in (": keepalive", "", "event: status", "data: a", "data:b", "", "data: c", ""):
            yield line

    async def read() -> list[ServerEvent]:
        return [event async for event in server_events(lines())]

    assert _run(read()) == [ServerEvent(name="status", data="a\nb"), ServerEvent(data="c")]


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        ServerClient(url)
