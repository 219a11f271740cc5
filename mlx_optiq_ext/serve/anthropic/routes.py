"""The paths of the Anthropic dialect. Each decodes, translates, and lets ``serve.sse`` answer."""

import asyncio
import secrets
from typing import Any

from litestar import Request, Response, Router, post
from litestar.types import ASGIApp

from mlx_optiq_ext.serve.anthropic.errors import error_body
from mlx_optiq_ext.serve.anthropic.from_events import MessageStream
from mlx_optiq_ext.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from mlx_optiq_ext.serve.anthropic.to_generation import session_of, to_generation
from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.errors import problem_of, problem_response
from mlx_optiq_ext.serve.serving import serving_of
from mlx_optiq_ext.serve.sse import StreamCollector, answer_whole, stream_answer, until_left
from mlx_optiq_ext.types.chat import Generation

__all__ = ["answer_problem", "router"]


def answer_problem(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer with an error in this dialect's shape, its id in the body and in the header."""
    name = _request_id(request)
    response = problem_response(problem_of(error), lambda problem: error_body(problem, name))
    response.headers["request-id"] = name
    return response


@post("/v1/messages", status_code=200)
async def create_message(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation, as a stream or whole."""
    body = await decode_body(request, MessagesRequest)
    run = serving_of(request).run(await _generation(request, body))
    name = _request_id(request)
    hidden = body.thinking is not None and body.thinking.display == "omitted"
    stream = MessageStream(omit_thinking=hidden, request_id=name)
    if body.stream:
        return stream_answer(run, stream, {"request-id": name})
    return answer_whole(run, StreamCollector(stream, stream.message), {"request-id": name})


@post("/v1/messages/count_tokens", status_code=200)
async def count_tokens(request: Request[Any, Any, Any]) -> Response[dict[str, int]]:
    """Count the prompt tokens that the same conversation would take."""
    body = await decode_body(request, CountTokensRequest)
    counted = serving_of(request).count_tokens(await _generation(request, body))
    tokens = await until_left(request, counted)
    return Response({"input_tokens": tokens}, headers={"request-id": _request_id(request)})


router = Router(
    "/", route_handlers=[create_message, count_tokens], exception_handlers={Exception: answer_problem}
)


async def _generation(request: Request[Any, Any, Any], body: CountTokensRequest) -> Generation:
    """Translate on a worker thread: a large picture takes a while, and one by URL must be fetched."""
    session = session_of(body, request.headers)
    return await asyncio.to_thread(to_generation, body, serving_of(request).images, session)


def _request_id(request: Request[Any, Any, Any]) -> str:
    state = request.scope.setdefault("state", {})
    name: str = state.setdefault("request_id", f"req_{secrets.token_hex(12)}")
    return name
