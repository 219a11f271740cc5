"""Describes the bodies of requests, and the answers, in the OpenAPI document.

Routes decode their bodies and write their answers themselves, so Litestar does not know them; the schemas are
msgspec's. Called by ``app``.
"""

from typing import Any, cast

import msgspec
from litestar import Litestar
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    PathItem,
    Reference,
    RequestBody,
    Schema,
)

from mlx_optiq_ext.serve.anthropic.answers import AnthropicError, MessageAnswer, TokenCount
from mlx_optiq_ext.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from mlx_optiq_ext.serve.control.adapters import Choosing, Mounting
from mlx_optiq_ext.serve.control.routes import Freed, LogLines, ModelName
from mlx_optiq_ext.serve.openai.answers import (
    ChatCompletion,
    EmbeddingList,
    ModelPage,
    ModelRow,
    OpenAIError,
    TextCompletion,
)
from mlx_optiq_ext.serve.openai.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from mlx_optiq_ext.serve.responses.answers import DeletedResponse, InputTokens, ItemPage, ResponseObject
from mlx_optiq_ext.serve.responses.schema import InputTokensRequest, ResponsesRequest

__all__ = ["ANSWERS", "describe_bodies"]

_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/adapters": Mounting,
    "/v1/adapters/use": Choosing,
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": InputTokensRequest,
    "/optiq/models/load": ModelName,
    "/optiq/models/unload": ModelName,
}
ANSWERS: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("post", "/v1/completions"): TextCompletion,
    ("post", "/v1/embeddings"): EmbeddingList,
    ("get", "/v1/models"): ModelPage,
    ("get", "/v1/models/{name}"): ModelRow,
    ("post", "/v1/messages"): MessageAnswer,
    ("post", "/v1/messages/count_tokens"): TokenCount,
    ("post", "/v1/responses"): ResponseObject,
    ("post", "/v1/responses/input_tokens"): InputTokens,
    ("get", "/v1/responses/{response_id}"): ResponseObject,
    ("delete", "/v1/responses/{response_id}"): DeletedResponse,
    ("get", "/v1/responses/{response_id}/input_items"): ItemPage,
    ("get", "/optiq/log"): LogLines,
    ("delete", "/optiq/prefix-cache"): Freed,
}
"""By method and path; those that Litestar knows from a route's own type are left out."""
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/optiq/log")
"""Paths that answer with server-sent events where the request asks for a stream."""
_EVENTS = {"text/event-stream": OpenAPIMediaType(schema=Schema(description="Server-sent events."))}
_METHODS = ("get", "post", "delete")


def describe_bodies(app: Litestar) -> None:
    """Add the schemas of all bodies and answers to the application's OpenAPI document."""
    document = app.openapi_schema
    kinds: set[type[msgspec.Struct]] = {*_BODIES.values(), *ANSWERS.values(), OpenAIError, AnthropicError}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    document.components = document.components or Components()
    # Litestar writes plain dictionaries as they are.
    document.components.schemas = {**(document.components.schemas or {}), **cast(Any, components)}
    media = {
        kind: OpenAPIMediaType(schema=Reference(ref=schema["$ref"]))
        for kind, schema in zip(ordered, schemas, strict=True)
    }
    for path, item in (document.paths or {}).items():
        for method, operation in _operations(item):
            _describe(operation, method, path, media)


def _operations(item: PathItem) -> list[tuple[str, Operation]]:
    found = ((method, getattr(item, method)) for method in _METHODS)
    return [(method, operation) for method, operation in found if operation is not None]


def _describe(
    operation: Operation, method: str, path: str, media: dict[type[msgspec.Struct], OpenAPIMediaType]
) -> None:
    """One operation; paths without ``/v1`` are those with it."""
    named = path if path.startswith(("/v1", "/optiq")) else f"/v1{path}"
    if method == "post" and named in _BODIES:
        body = {"application/json": media[_BODIES[named]]}
        operation.request_body = RequestBody(content=body, required=True)
    responses = operation.responses = operation.responses or {}
    answer = ANSWERS.get((method, named))
    if answer is not None:
        content = {"application/json": media[answer], **(_EVENTS if named in _STREAMED else {})}
        responses["200"] = OpenAPIResponse(description="The answer.", content=content)
    elif path == "/optiq/events":
        responses["200"] = OpenAPIResponse(description="Snapshots of the status.", content=_EVENTS)
    if named.endswith("/health"):
        responses["503"] = responses["200"]
    error = AnthropicError if named.startswith("/v1/messages") else OpenAIError
    responses.pop("400", None)  # Litestar's own shape, which no route answers with
    responses["default"] = OpenAPIResponse(
        description="An error.", content={"application/json": media[error]}
    )
