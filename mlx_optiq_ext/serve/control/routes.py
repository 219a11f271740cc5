"""The paths for operators and the dashboard: health, metrics, status, log, models, prefix cache."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from litestar import Request, Response, Router, delete, get, head, post
from litestar.response import Stream

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.control.metrics import metrics_text
from mlx_optiq_ext.serve.openai.routes import answer_problem
from mlx_optiq_ext.serve.serving import Serving, serving_of
from mlx_optiq_ext.serve.sse import sse_event, until_left
from mlx_optiq_ext.types.port import Engine, LogLine
from mlx_optiq_ext.types.status import ClientStatus, EngineStatus

__all__ = ["router"]

_LOOK_S = 0.2
"""How soon a change shows in a stream."""
_TELL_S = 1.0
"""How often a stream tells although nothing changed."""
_RETRY_S = 2
_METRICS_TYPE = "text/plain; version=0.0.4"


class ModelName(msgspec.Struct, frozen=True, kw_only=True):
    """Names a model."""

    model: str


class ClientList(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked lately."""

    data: tuple[ClientStatus, ...]
    object: str = "list"


class LogLines(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of the log, oldest first."""

    lines: tuple[LogLine, ...]


class Freed(msgspec.Struct, frozen=True, kw_only=True):
    """What is no longer held."""

    freed_nbytes: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests are taken."""

    status: str
    reason: str | None = None


_REASONS = {
    "loading": "models are being loaded",
    "draining": "the server is stopping and lets running requests end",
    "failed": "the engine failed again and again; the log says why",
}


@get(["/", "/health"])
async def health(request: Request[Any, Any, Any]) -> Response[Health]:
    """Say whether requests are taken: 200 where they are, else 503 with the reason."""
    state = serving_of(request).engine.status().state
    ready = state == "ready"
    return Response(
        Health(status=state, reason=_REASONS.get(state)),
        status_code=200 if ready else 503,
        headers={} if ready else {"retry-after": str(_RETRY_S)},
    )


@head(["/", "/health"])
async def health_head(request: Request[Any, Any, Any]) -> Response[None]:
    """Say whether requests are taken, without words."""
    ready = serving_of(request).engine.status().state == "ready"
    return Response(None, status_code=200 if ready else 503)


@get("/metrics", media_type="text/plain")
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Tell Prometheus."""
    return Response(metrics_text(serving_of(request).engine), media_type=_METRICS_TYPE)


@get("/optiq/status")
async def status(request: Request[Any, Any, Any]) -> EngineStatus:
    """Show the latest snapshot."""
    return serving_of(request).status()


@get("/optiq/clients")
async def clients(request: Request[Any, Any, Any]) -> ClientList:
    """List the programs that asked lately, the last one first."""
    return ClientList(data=serving_of(request).clients.status())


@get("/optiq/events")
async def status_events(request: Request[Any, Any, Any]) -> Stream:
    """Stream snapshots: one each second, and one whenever models, rows or the state change."""
    return _stream(_snapshots(serving_of(request)))


@get("/optiq/log")
async def log(request: Request[Any, Any, Any]) -> Response[LogLines] | Stream:
    """Show the log's lines after number ``after``, once, or as a stream that goes on (``stream=true``)."""
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) < 19):
        raise RequestError(f"after is {after[:40]!r}; give the number of a line", param="after")
    engine = serving_of(request).engine
    if request.query_params.get("stream") == "true":
        return _stream(_lines(engine, int(after)))
    return Response(LogLines(lines=engine.log_lines(int(after))))


@post("/optiq/models/load", status_code=200)
async def load_model(request: Request[Any, Any, Any]) -> EngineStatus:
    """Load a model now."""
    body = await decode_body(request, ModelName)
    serving = serving_of(request)
    await until_left(request, serving.engine.load(body.model))
    return serving.status()


@post("/optiq/models/unload", status_code=200)
async def unload_model(request: Request[Any, Any, Any]) -> EngineStatus:
    """Drop a model that no request uses."""
    body = await decode_body(request, ModelName)
    serving = serving_of(request)
    await until_left(request, serving.engine.unload(body.model))
    return serving.status()


@delete("/optiq/prefix-cache", status_code=200)
async def clear_prefix_cache(request: Request[Any, Any, Any]) -> Freed:
    """Drop every cached prefix, on disk too."""
    freed = await until_left(request, serving_of(request).engine.clear_prefix_cache())
    return Freed(freed_nbytes=freed)


router = Router(
    "/",
    route_handlers=[
        health,
        health_head,
        metrics,
        status,
        clients,
        status_events,
        log,
        load_model,
        unload_model,
        clear_prefix_cache,
    ],
    exception_handlers={Exception: answer_problem},
)


def _stream(chunks: AsyncIterator[bytes]) -> Stream:
    return Stream(chunks, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def _snapshots(serving: Serving) -> AsyncIterator[bytes]:
    """Until the client leaves, or the server stops."""
    last: Any = None
    told = 0.0
    while True:
        now = serving.status()
        essence = (now.state, now.models, [(row.id, row.state) for row in now.rows])
        if essence != last or time.monotonic() - told >= _TELL_S:
            last, told = essence, time.monotonic()
            yield sse_event("status", now)
        if now.state in ("draining", "failed"):
            return
        await asyncio.sleep(_LOOK_S)


async def _lines(engine: Engine, after: int) -> AsyncIterator[bytes]:
    """Until the client leaves, or the server stops."""
    told = time.monotonic()
    while True:
        lines: tuple[LogLine, ...] = engine.log_lines(after)
        for line in lines:
            after = line.number
            yield sse_event("line", line)
        if lines:
            told = time.monotonic()
        elif time.monotonic() - told >= _TELL_S:
            told = time.monotonic()
            yield b": keepalive\n\n"
        if engine.status().state in ("draining", "failed"):
            return
        await asyncio.sleep(_LOOK_S)
