"""A server made of a recording: an HTTP transport for the client, in place of the network.

Answers the paths that the dashboard asks, keeps what is switched (adapters) as a server would, and refuses
what needs a real one with words that say so. Used by ``optiq tui --demo`` and by tests.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import httpx
import msgspec
from msgspec.structs import replace

from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.chat_stream import ChatDelta
from mlx_optiq_tui.client import ServerClient
from mlx_optiq_tui.demo.recording import Answer, Recording, read_recording

__all__ = ["DemoServer", "demo_client"]

_BASE = "base"
_STILL_S = 0.2
"""How soon a switch shows while the recording stands still."""


class DemoServer(httpx.AsyncBaseTransport):
    """Plays a recording from its beginning, over and over; the log once.

    Args:
        recording: What to play.
        speed: Seconds of the recording per second; 0 tells everything at once.
        until: Moments after which the recording stands still, for pictures that are always the same.
    """

    def __init__(self, recording: Recording, *, speed: float = 1.0, until: int | None = None) -> None:
        self._recording = recording
        self._speed = speed
        self._until = until
        self._adapters = {each.name: each for each in recording.moments[0].status.adapters}
        self._known = (*recording.moments[0].status.adapters, *recording.available)
        self._now = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        await request.aread()
        route = (request.method, request.url.path)
        if route == ("GET", "/optiq/events"):
            return _stream(self._snapshots())
        if route == ("GET", "/optiq/log"):
            return _stream(self._log())
        if route == ("GET", "/optiq/status"):
            return _answer(self._status(self._now))
        if route == ("GET", "/health"):
            return _answer({"status": "ready"})
        if route == ("GET", "/v1/models"):
            return _answer({"object": "list", "data": self._models()})
        if route == ("POST", "/v1/chat/completions"):
            return _stream(self._chat(msgspec.json.decode(request.content)))
        if request.url.path.startswith("/v1/adapters"):
            return self._switch_adapters(request)
        return _refuse(404, f"the recorded server does not know {request.method} {request.url.path}")

    async def _snapshots(self) -> AsyncIterator[bytes]:
        for number in itertools.count() if self._until is None else range(self._until):
            self._now = number
            yield _event("status", self._status(number))
            await self._wait(1.0)
        while True:
            await asyncio.sleep(_STILL_S)
            yield _event("status", self._status(self._now))

    async def _log(self) -> AsyncIterator[bytes]:
        for moment in self._recording.moments[: self._until]:
            for line in moment.lines:
                yield _event("line", line)
            await self._wait(1.0)
        await asyncio.Event().wait()

    def _status(self, number: int) -> EngineStatus:
        moments = self._recording.moments
        recorded = moments[number % len(moments)].status
        turn_s = moments[-1].status.uptime_s - moments[0].status.uptime_s + 1
        adapters = tuple(self._adapters.values())
        return replace(
            recorded,
            uptime_s=recorded.uptime_s + number // len(moments) * turn_s,
            adapters=adapters,
            models=tuple(
                replace(model, adapters=tuple(each.name for each in adapters)) if model.loaded else model
                for model in recorded.models
            ),
        )

    def _models(self) -> list[dict[str, Any]]:
        return [
            {"id": model.id, "object": "model", "created": model.created, "context_length": model.context}
            for model in self._status(self._now).models
        ]

    def _switch_adapters(self, request: httpx.Request) -> httpx.Response:
        name = unquote(request.url.path.removeprefix("/v1/adapters").strip("/"))
        if request.method == "POST":
            body = msgspec.json.decode(request.content)
            if name == "use":
                return self._use(body.get("name"))
            return self._mount(str(body["name"]), str(body["source"]))
        if request.method == "DELETE":
            if name not in self._adapters:
                return _refuse(404, f"no adapter {name!r} is mounted")
            del self._adapters[name]
            return _answer({"name": name, "deleted": True})
        return self._list()

    def _mount(self, name: str, source: str) -> httpx.Response:
        found = [each for each in self._known if each.source == source]
        if not found:
            sources = ", ".join(sorted(each.source for each in self._known))
            return _refuse(400, f"the recorded server has no adapter {source!r}; it has {sources}")
        mounted = replace(found[0], name=name, is_default=False, requests=0)
        self._adapters[name] = mounted
        return _answer(mounted, 201)

    def _use(self, name: str | None) -> httpx.Response:
        if name is not None and name not in self._adapters:
            return _refuse(404, f"no adapter {name!r} is mounted")
        self._adapters = {
            each.name: replace(each, is_default=each.name == name) for each in self._adapters.values()
        }
        return self._list()

    def _list(self) -> httpx.Response:
        sources = sorted(each.source for each in self._known)
        mounted = tuple(self._adapters.values())
        return _answer({"object": "list", "data": mounted, "available": sources})

    async def _chat(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        answer = self._find_answer(body)
        pause_s = (answer.seconds - answer.first_token_s) / max(len(answer.deltas) - 1, 1)
        await self._wait(answer.first_token_s)
        for delta in answer.deltas:
            yield _event("message", _chunk(delta))
            await self._wait(pause_s)
        yield b"data: [DONE]\n\n"

    def _find_answer(self, body: dict[str, Any]) -> Answer:
        """What was recorded for the last words of the user, else for the same adapter."""
        asked = [message["content"] for message in body["messages"] if message["role"] == "user"][-1]
        default = next((each for each in self._adapters.values() if each.is_default), None)
        named = str(body.get("adapter") or (default.name if default else _BASE))
        source = self._adapters[named].source if named in self._adapters else ""
        of_adapter = [each for each in self._recording.answers if each.adapter == source]
        fits = [each for each in of_adapter if each.prompt == asked]
        return (fits or of_adapter or list(self._recording.answers))[0]

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._speed if self._speed else 0)


def demo_client(*, speed: float = 1.0, until: int | None = None) -> ServerClient:
    """A client of the recording that comes with this package; arguments as of :class:`DemoServer`."""
    return ServerClient("http://recording", transport=DemoServer(read_recording(), speed=speed, until=until))


class _Stream(httpx.AsyncByteStream):
    """Server-sent events as they come."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk


def _stream(chunks: AsyncIterator[bytes]) -> httpx.Response:
    return httpx.Response(200, stream=_Stream(chunks), headers={"content-type": "text/event-stream"})


def _answer(document: object, status: int = 200) -> httpx.Response:
    return httpx.Response(status, content=msgspec.json.encode(document))


def _refuse(status: int, message: str) -> httpx.Response:
    return _answer({"error": {"message": message}}, status)


def _event(name: str, document: object) -> bytes:
    return f"event: {name}\ndata: {msgspec.json.encode(document).decode()}\n\n".encode()


def _chunk(delta: ChatDelta) -> dict[str, Any]:
    """A piece of an answer as a server tells it."""
    if delta.usage is not None:
        usage = delta.usage
        return {
            "choices": [],
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
                "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            },
        }
    said = {"content": delta.text, "reasoning_content": delta.reasoning}
    choice = {
        "delta": {name: text for name, text in said.items() if text},
        "finish_reason": delta.finish_reason,
    }
    return {"choices": [choice]}
