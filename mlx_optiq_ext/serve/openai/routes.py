"""The paths of the OpenAI dialect. Each decodes, translates, and lets ``serve.sse`` answer."""

import asyncio
from typing import Any

from litestar import Request, Router, post
from litestar.types import ASGIApp

from mlx_optiq_ext.serve.body import decode_body
from mlx_optiq_ext.serve.errors import problem_handler
from mlx_optiq_ext.serve.openai.completions import CompletionCollector, CompletionStream
from mlx_optiq_ext.serve.openai.embeddings import embeddings_document
from mlx_optiq_ext.serve.openai.errors import STATUSES, error_body
from mlx_optiq_ext.serve.openai.from_events import ChatCollector, ChatStream
from mlx_optiq_ext.serve.openai.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingFields,
)
from mlx_optiq_ext.serve.openai.to_generation import chat_generations, completion_generations, prompts_of
from mlx_optiq_ext.serve.openai.usage import UsageSum
from mlx_optiq_ext.serve.serving import serving_of
from mlx_optiq_ext.serve.sse import answer_whole, stream_answer, until_left

__all__ = ["answer_problem", "router"]

answer_problem = problem_handler(error_body, STATUSES)


@post(["/v1/chat/completions", "/chat/completions"], status_code=200)
async def create_chat_completion(request: Request[Any, Any, Any]) -> ASGIApp:
    """Answer a conversation, as a stream or whole."""
    body = await decode_body(request, ChatRequest)
    serving = serving_of(request)
    generations = await asyncio.to_thread(chat_generations, body, serving.images, request.headers)
    run = serving.run(*generations)
    if body.stream:
        return stream_answer(run, ChatStream(len(generations), include_usage=_include_usage(body)))
    return answer_whole(run, ChatCollector(len(generations)))


@post(["/v1/completions", "/completions"], status_code=200)
async def create_completion(request: Request[Any, Any, Any]) -> ASGIApp:
    """Go on from one or several prompts as they are, as a stream or whole."""
    body = await decode_body(request, CompletionRequest)
    generations = completion_generations(body, request.headers)
    echoes = [g.prompt if body.echo and isinstance(g.prompt, str) else "" for g in generations]
    usage = UsageSum(len(generations), body.n or 1)
    run = serving_of(request).run(*generations)
    if body.stream:
        return stream_answer(run, CompletionStream(echoes, usage, include_usage=_include_usage(body)))
    return answer_whole(run, CompletionCollector(echoes, usage))


@post(["/v1/embeddings", "/embeddings"], status_code=200)
async def create_embeddings(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """Turn texts into vectors."""
    body = await decode_body(request, EmbeddingRequest)
    inputs = prompts_of(body.input, "input")
    found = await until_left(request, serving_of(request).engine.embed(body.model, inputs))
    return embeddings_document(found, body)


router = Router(
    "/",
    route_handlers=[create_chat_completion, create_completion, create_embeddings],
    exception_handlers={Exception: answer_problem},
)


def _include_usage(body: SamplingFields) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)
