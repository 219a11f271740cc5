"""The paths of the Responses dialect. Each decodes, translates, and lets ``serve.sse`` answer."""

import asyncio
from typing import Any

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.params import FromPath
from litestar.types import ASGIApp

from mlx_optiq_ext.errors import RequestError, UnknownName
from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.errors import problem_handler
from mlx_optiq_ext.serve.openai.errors import STATUSES
from mlx_optiq_ext.serve.responses.document import is_stored, response_document
from mlx_optiq_ext.serve.responses.errors import error_body
from mlx_optiq_ext.serve.responses.from_events import Drafting, ResponseStream
from mlx_optiq_ext.serve.responses.items import normalized, resolved
from mlx_optiq_ext.serve.responses.pages import page_of
from mlx_optiq_ext.serve.responses.schema import InputTokensRequest, Item, ResponsesRequest
from mlx_optiq_ext.serve.responses.store import ResponseStore
from mlx_optiq_ext.serve.responses.to_generation import Conversation, session_of, to_generation
from mlx_optiq_ext.serve.responses.tools import ToolTable, tool_table
from mlx_optiq_ext.serve.serving import serving_of
from mlx_optiq_ext.serve.sse import StreamCollector, answer_whole, stream_answer, until_left
from mlx_optiq_ext.types.chat import Generation

__all__ = ["router"]

ENCRYPTED = "reasoning.encrypted_content"
"""What ``include`` calls reasoning that the client brings back unseen."""


@post("/v1/responses", status_code=200)
async def create_response(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation, as a stream or whole, and keep it unless told otherwise."""
    body = await decode_body(request, ResponsesRequest)
    asked = await _translated(request, body)
    generation = msgspec.structs.replace(asked.generation, session=session_of(body, request.headers))
    store, own = _store(request), asked.own
    stream = ResponseStream(
        Drafting(
            document=response_document(body),
            table=asked.table,
            summarize=bool(body.reasoning and body.reasoning.summary not in (None, "none")),
            seal=ENCRYPTED in (body.include or ()),
            keep=(lambda response: store.put(response, own)) if is_stored(body) else None,
        )
    )
    run = serving_of(request).run(generation)
    return (
        stream_answer(run, stream)
        if body.stream
        else answer_whole(run, StreamCollector(stream, lambda: stream.response))
    )


@post("/v1/responses/input_tokens", status_code=200)
async def count_input_tokens(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """Count the prompt tokens that the same conversation would take."""
    body = await decode_body(request, InputTokensRequest)
    asked = await _translated(request, body)
    tokens = await until_left(request, serving_of(request).count_tokens(asked.generation))
    return {"object": "response.input_tokens", "input_tokens": tokens}


@post("/v1/responses/compact")
async def compact() -> None:
    """Say that conversations are not compacted here."""
    raise UnknownName("conversations are not compacted here; ask the model for a summary", param="path")


@get("/v1/responses/{response_id:str}")
async def retrieve_response(request: Request[Any, Any, Any], response_id: FromPath[str]) -> Response[bytes]:
    """Return a stored response."""
    stored = _store(request).get(response_id)
    if request.query_params.get("stream") == "true":
        raise RequestError("a stored response is not streamed again; leave out stream", param="stream")
    return Response(stored.response, media_type="application/json")


@delete("/v1/responses/{response_id:str}", status_code=200)
async def delete_response(request: Request[Any, Any, Any], response_id: FromPath[str]) -> dict[str, Any]:
    """Forget a stored response."""
    _store(request).delete(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@post("/v1/responses/{response_id:str}/cancel")
async def cancel_response(request: Request[Any, Any, Any], response_id: FromPath[str]) -> None:
    """Say that what is stored has ended: only background responses could be cancelled."""
    _store(request).get(response_id)
    raise RequestError("only background responses can be cancelled; close the connection of a running one")


@get("/v1/responses/{response_id:str}/input_items")
async def list_input_items(request: Request[Any, Any, Any], response_id: FromPath[str]) -> dict[str, Any]:
    """List the items that a stored response's request brought."""
    return page_of(_store(request).get(response_id).input_items(), request.query_params)


router = Router(
    "/",
    route_handlers=[
        create_response,
        count_input_tokens,
        compact,
        retrieve_response,
        delete_response,
        cancel_response,
        list_input_items,
    ],
    exception_handlers={Exception: problem_handler(error_body, STATUSES)},
)


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    generation: Generation
    own: list[Item]
    table: ToolTable


async def _translated(request: Request[Any, Any, Any], body: InputTokensRequest) -> _Asked:
    """Translate, the costly part on a worker thread: large pictures, and those that must be fetched."""
    store = _store(request)
    own = resolved(normalized(body.input), store.item)
    conversation = Conversation(earlier=store.items_before(body.previous_response_id), own=own)
    table = tool_table(body.tools or (), body.tool_choice, parallel=body.parallel_tool_calls is not False)
    images = serving_of(request).images
    generation = await asyncio.to_thread(to_generation, body, conversation, table, images)
    return _Asked(generation=generation, own=own, table=table)


def _store(request: Request[Any, Any, Any]) -> ResponseStore:
    """The application's store, made by the first who asks."""
    store = request.app.state.setdefault("response_store", ResponseStore())
    assert isinstance(store, ResponseStore)
    return store
