"""The paths of the Anthropic dialect. Each decodes, translates, and lets ``serve.sse`` answer."""

import asyncio
from typing import Any

from litestar import Request, Response, Router, post
from litestar.types import ASGIApp

from mlx_optiq_ext.serve.account import Account
from mlx_optiq_ext.serve.anthropic.errors import error_body
from mlx_optiq_ext.serve.anthropic.from_events import MessageStream
from mlx_optiq_ext.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from mlx_optiq_ext.serve.anthropic.to_generation import session_of, to_generation
from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.errors import noted_problem, problem_response, with_allow
from mlx_optiq_ext.serve.serving import serving_of
from mlx_optiq_ext.serve.sse import StreamCollector, answer_whole, stream_answer, until_left
from mlx_optiq_ext.types.chat import Generation

__all__ = ["answer_problem", "router"]


def answer_problem(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer with an error in this dialect's shape, its id in the body and in the header."""
    name = Account.of(request.scope).id
    response = problem_response(noted_problem(request, error), lambda problem: error_body(problem, name))
    return with_allow(response, error)


@post("/v1/messages", status_code=200)
async def create_message(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation, as a stream or whole."""
    body = await decode_body(request, MessagesRequest)
    run = serving_of(request).run(await _generation(request, body))
    hidden = body.thinking is not None and body.thinking.display == "omitted"
    stream = MessageStream(omit_thinking=hidden, request_id=Account.of(request.scope).id)
    if body.stream:
        return stream_answer(run, stream)
    return answer_whole(run, StreamCollector(stream, stream.message))


@post("/v1/messages/count_tokens", status_code=200)
async def count_tokens(request: Request[Any, Any, Any]) -> dict[str, int]:
    """Count the prompt tokens that the same conversation would take."""
    body = await decode_body(request, CountTokensRequest)
    counted = serving_of(request).count_tokens(await _generation(request, body))
    return {"input_tokens": await until_left(request, counted)}


router = Router(
    "/", route_handlers=[create_message, count_tokens], exception_handlers={Exception: answer_problem}
)


async def _generation(request: Request[Any, Any, Any], body: CountTokensRequest) -> Generation:
    """Translate on a worker thread: a large picture takes a while, and one by URL must be fetched."""
    session = session_of(body, request.headers)
    return await asyncio.to_thread(to_generation, body, serving_of(request).images, session)
