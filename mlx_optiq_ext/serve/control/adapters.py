"""The paths that mount adapters and take them off while the server runs."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Router, delete, get, post
from litestar.params import FromPath

from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.openai.routes import answer_problem
from mlx_optiq_ext.serve.serving import Serving, serving_of
from mlx_optiq_ext.serve.sse import until_left
from mlx_optiq_ext.types.status import AdapterStatus

__all__ = ["router"]

_EVERY_FORM = "*/adapter_config.json"


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """What is mounted, and what could be."""

    data: tuple[AdapterStatus, ...]
    available: tuple[str, ...]
    """Sources below ``--adapters-dir``; mounted ones too, and any Hub id besides."""
    object: str = "list"


class Mounting(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter to mount."""

    name: str
    source: str
    """Folder below one of ``--adapters-dir``, or a Hub id."""
    model: str = ""


class Choosing(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter of requests that name none; null: the base model."""

    name: str | None
    model: str = ""


class Unmounted(msgspec.Struct, frozen=True, kw_only=True):
    """What is gone for new requests."""

    name: str
    deleted: bool = True


@get("/v1/adapters")
async def list_adapters(request: Request[Any, Any, Any]) -> AdapterList:
    """List what requests can name."""
    return await _listed(serving_of(request))


@post("/v1/adapters", status_code=201)
async def mount_adapter(request: Request[Any, Any, Any]) -> AdapterStatus:
    """Mount an adapter; rows go on meanwhile."""
    body = await decode_body(request, Mounting)
    return await until_left(request, serving_of(request).engine.mount(body.name, body.source, body.model))


@delete("/v1/adapters/{name:str}", status_code=200)
async def unmount_adapter(request: Request[Any, Any, Any], name: FromPath[str]) -> Unmounted:
    """Take an adapter away from new requests; its memory is freed when no row uses it."""
    model = request.query_params.get("model", "")
    await until_left(request, serving_of(request).engine.unmount(name, model))
    return Unmounted(name=name)


@post("/v1/adapters/use", status_code=200)
async def use_adapter(request: Request[Any, Any, Any]) -> AdapterList:
    """Choose the adapter of requests that name none."""
    body = await decode_body(request, Choosing)
    serving = serving_of(request)
    await until_left(request, serving.engine.use(body.name, body.model))
    return await _listed(serving)


router = Router(
    "/",
    route_handlers=[list_adapters, mount_adapter, use_adapter, unmount_adapter],
    exception_handlers={Exception: answer_problem},
)


async def _listed(serving: Serving) -> AdapterList:
    available = await asyncio.to_thread(_sources, serving.adapter_folders)
    return AdapterList(data=serving.engine.status().adapters, available=available)


def _sources(folders: Iterable[str]) -> tuple[str, ...]:
    """Names of the adapter folders in these folders, whatever form the adapters have."""
    found = (path.parent.name for folder in folders for path in Path(folder).expanduser().glob(_EVERY_FORM))
    return tuple(sorted(set(found)))
