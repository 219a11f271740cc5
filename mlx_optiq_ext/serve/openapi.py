"""Describes the bodies of requests in the OpenAPI document.

Routes decode their bodies themselves, so Litestar does not know them; the schemas are msgspec's.
"""

from typing import Any, cast

import msgspec
from litestar import Litestar
from litestar.openapi.spec import Components, OpenAPIMediaType, Reference, RequestBody

from mlx_optiq_ext.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from mlx_optiq_ext.serve.control.routes import ModelName
from mlx_optiq_ext.serve.openai.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from mlx_optiq_ext.serve.responses.schema import InputTokensRequest, ResponsesRequest

__all__ = ["describe_bodies"]

_BODIES: dict[str, type[msgspec.Struct]] = {
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


def describe_bodies(app: Litestar) -> None:
    """Add the schema of each request body to the application's OpenAPI document."""
    document = app.openapi_schema
    schemas, components = msgspec.json.schema_components(
        _BODIES.values(), ref_template="#/components/schemas/{name}"
    )
    document.components = document.components or Components()
    # Litestar writes plain dictionaries as they are.
    document.components.schemas = {**(document.components.schemas or {}), **cast(Any, components)}
    for path, schema in zip(_BODIES, schemas, strict=True):
        operation = (document.paths or {})[path].post
        assert operation is not None
        body = OpenAPIMediaType(schema=Reference(ref=schema["$ref"]))
        operation.request_body = RequestBody(content={"application/json": body}, required=True)
