"""Talk to a server over HTTP: its status as it changes, its log, its switches, and chat answers as they come.

Knows the server's paths and nothing of what is drawn. Everything runs on the caller's event loop; nothing
blocks it. Errors are told in the server's own words.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import httpx
import msgspec

from mlx_optiq_ext.errors import EngineError, OptiqError, RequestError, Unauthorized, UsageError
from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus
from mlx_optiq_tui.chat_stream import ChatDelta, ServerEvent, chat_deltas, server_events, text_lines

__all__ = ["DEFAULT_URL", "Adapters", "Lost", "ServerClient"]

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8080"
_SAYS_NOTHING = "All connection attempts failed"
"""As httpx words it where nobody listens; it would only make the message longer."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CONNECT_S = 5.0
_SILENCE_S = 15.0
"""A stream tells something each second; one that is silent this long is dead."""
_WORK_S = 600.0
"""Loading a model or mounting an adapter may take this long."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """The server does not answer."""

    reason: str
    retry_s: float
    """Until it is asked again."""


class Adapters(msgspec.Struct, frozen=True):
    """What requests can name, and what could be mounted besides."""

    data: tuple[AdapterStatus, ...] = ()
    available: tuple[str, ...] = ()
    """Folders below the server's ``--adapters-dir``; mounted ones too."""


class ServerClient:
    """One server's client; close it when done.

    Args:
        url: Where it listens, as ``http://host:port``.
        key: API key.
        transport: In place of the network: the recorded server of ``--demo``, or a test's.
        first_wait_s: How soon a lost server is asked again; doubled each time, up to 8 seconds.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self.url = checked_url(url)
        self.key = key
        self._first_wait_s = first_wait_s
        self._http = httpx.AsyncClient(
            base_url=self.url,
            transport=transport,
            headers={"user-agent": "optiq-lab", **({"authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(_WORK_S, connect=_CONNECT_S),
            # A proxy of the environment cannot reach a server on this machine.
            trust_env=httpx.URL(self.url).host not in _LOOPBACK,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, method: str, path: str, body: object = None, *, kind: type[T]) -> T:
        """Send one request and decode its answer.

        Args:
            method: ``GET``, ``POST`` or ``DELETE``.
            path: Quoted, with its query.
            body: Sent as JSON; None sends none.
            kind: Type of the answer; unknown fields are skipped.
        Raises:
            EngineError: Nobody answers there, or it is no optiq server.
            RequestError: The server refuses; the message is its own.
        """
        try:
            answer = await self._http.request(
                method,
                path,
                content=None if body is None else msgspec.json.encode(body),
                headers={} if body is None else {"content-type": "application/json"},
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise self._refusal(answer)
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError as error:
            raise EngineError(f"{self.url}{path} is not an optiq server of this version ({error})") from error

    async def status(self) -> EngineStatus:
        """The latest snapshot."""
        return await self.ask("GET", "/optiq/status", kind=EngineStatus)

    async def adapters(self) -> Adapters:
        """What is mounted, and what could be."""
        return await self.ask("GET", "/v1/adapters", kind=Adapters)

    async def mount(self, name: str, source: str, model: str = "") -> AdapterStatus:
        """Mount an adapter: a folder below the server's ``--adapters-dir``, or a Hub id."""
        body = {"name": name, "source": source, "model": model}
        return await self.ask("POST", "/v1/adapters", body, kind=AdapterStatus)

    async def unmount(self, name: str, model: str = "") -> None:
        """Take an adapter from new requests."""
        query = f"?{urlencode({'model': model})}" if model else ""
        await self.ask("DELETE", f"/v1/adapters/{quote(name, safe='')}{query}", kind=dict[str, Any])

    async def use(self, name: str | None, model: str = "") -> tuple[AdapterStatus, ...]:
        """Choose the adapter of requests that name none; None: the model itself."""
        body = {"name": name, "model": model}
        return (await self.ask("POST", "/v1/adapters/use", body, kind=Adapters)).data

    async def follow_status(self) -> AsyncGenerator[EngineStatus | Lost, None]:
        """Snapshots as the server tells them, for ever; when it is lost, that, and again when it is back."""
        wait_s = self._first_wait_s
        while True:
            try:
                async with contextlib.aclosing(self._events("GET", "/optiq/events")) as events:
                    async for event in events:
                        yield msgspec.json.decode(event.data, type=EngineStatus)
                        wait_s = self._first_wait_s
                reason = "the server is stopping"
            except (OptiqError, msgspec.MsgspecError) as error:
                reason = str(error)
            yield Lost(reason=reason, retry_s=wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    async def follow_log(self) -> AsyncGenerator[LogLine, None]:
        """Lines of the server's log, those it still has first, for ever; each line once."""
        wait_s = self._first_wait_s
        # A server that was started again counts from 1, so numbers alone do not tell what is new.
        last = (0.0, 0)
        while True:
            with contextlib.suppress(OptiqError, msgspec.MsgspecError):
                async with contextlib.aclosing(self._events("GET", "/optiq/log?stream=true")) as events:
                    async for event in events:
                        line = msgspec.json.decode(event.data, type=LogLine)
                        if (line.time, line.number) > last:
                            last = (line.time, line.number)
                            yield line
                        wait_s = self._first_wait_s
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[ChatDelta, None]:
        """Stream one answer; leaving the loop, or cancelling its task, stops the server's work.

        Args:
            body: Of ``/v1/chat/completions`` (``model``, ``adapter``, ``messages``, ``tools``, sampling);
                streaming and usage are asked for here.
        Raises:
            EngineError: Nobody answers there, or the connection breaks.
            RequestError: The server refuses, or ends the answer with an error.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with contextlib.aclosing(self._events("POST", "/v1/chat/completions", asked)) as events:
            async for delta in chat_deltas(events):
                yield delta

    async def _events(self, method: str, path: str, body: object = None) -> AsyncGenerator[ServerEvent, None]:
        # An answer begins when the server has taken the request, which may wait for others.
        silence_s = _SILENCE_S if body is None else _WORK_S
        try:
            async with self._http.stream(
                method,
                path,
                content=None if body is None else msgspec.json.encode(body),
                headers={} if body is None else {"content-type": "application/json"},
                timeout=httpx.Timeout(silence_s, connect=_CONNECT_S),
            ) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise self._refusal(answer)
                async for event in server_events(text_lines(answer.aiter_bytes())):
                    yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> EngineError:
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return EngineError(f"the server at {self.url} went away in the middle of an answer")
        why = str(error) or type(error).__name__
        if why == _SAYS_NOTHING:
            return EngineError(f"no optiq server answers at {self.url}")
        return EngineError(f"no optiq server answers at {self.url} ({why})")

    def _refusal(self, answer: httpx.Response) -> RequestError:
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"{self.url} answered {answer.status_code}; is it an optiq server?"
        if answer.status_code == 401:
            return Unauthorized(f"{self.url} wants its key: give it in OPTIQ_API_KEY or by --api-key-file")
        return RequestError(message)


def checked_url(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        UsageError: It is none.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"--url {url!r} is no address ({error}); write it like {DEFAULT_URL}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"--url {url!r} is no address; write it like {DEFAULT_URL}")
    return url.rstrip("/")
