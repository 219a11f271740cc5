"""What is served, as rows that clients of the OpenAI and of the Anthropic dialect both understand.

One row carries the fields of both. Only ``max_tokens`` is left to those who ask as Anthropic clients: others
take it for the context.
Source: OpenAI and Anthropic API references, "Models"; ``max_model_len`` and ``context_length`` as local
servers spell them.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from litestar import Request, Router, get
from litestar.params import FromPath

from mlx_optiq_ext.errors import RequestError, UnknownName
from mlx_optiq_ext.serve.dialect import answer_problem, is_anthropic
from mlx_optiq_ext.serve.serving import serving_of
from mlx_optiq_ext.types.status import ServedModel

__all__ = ["model_page", "model_row", "router"]

_MAX_LIMIT = 1000


@get(["/v1/models", "/models"])
async def list_models(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """List the models, as both dialects do."""
    models = serving_of(request).engine.status().models
    return model_page(models, request.query_params, anthropic=is_anthropic(request))


@get(["/v1/models/{name:path}", "/models/{name:path}"])
async def retrieve_model(request: Request[Any, Any, Any], name: FromPath[str]) -> dict[str, Any]:
    """Show one model by its name, which may contain slashes, encoded or not."""
    models = serving_of(request).engine.status().models
    return model_row(models, name.lstrip("/"), anthropic=is_anthropic(request))


router = Router(
    "/", route_handlers=[list_models, retrieve_model], exception_handlers={Exception: answer_problem}
)


def model_page(models: Iterable[ServedModel], query: Mapping[str, str], *, anthropic: bool) -> dict[str, Any]:
    """List all models, or a page of them.

    Args:
        models: What is served; an adapter is listed as ``model@adapter``.
        query: ``limit``, ``after_id``, ``before_id``.
        anthropic: Whether the client asks as Anthropic's do.
    Raises:
        RequestError: The limit is no number from 1 to 1,000.
    """
    rows = _rows(models, anthropic=anthropic)
    limit = _limit(query.get("limit"))
    ids = [row["id"] for row in rows]
    begin, end = 0, len(rows)
    if (after := query.get("after_id")) in ids:
        begin = ids.index(after) + 1
    if (before := query.get("before_id")) in ids:
        end = ids.index(before)
        begin = max(begin, end - limit)
    page = rows[begin:end][:limit]
    more = begin > 0 if before in ids else begin + len(page) < end
    return {
        "object": "list",
        "data": page,
        "has_more": more,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


def model_row(models: Sequence[ServedModel], name: str, *, anthropic: bool) -> dict[str, Any]:
    """One model by its name, or by one that the user gave it.

    Raises:
        UnknownName: There is none.
    """
    rows = _rows(models, anthropic=anthropic)
    name = next((model.id for model in models if name in model.aliases), name)
    for row in rows:
        if row["id"] == name:
            return row
    known = ", ".join(row["id"] for row in rows)
    raise UnknownName(f"no model {name[:200]!r}; there are: {known}", param="model")


def _rows(models: Iterable[ServedModel], *, anthropic: bool) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        row = _row(model, anthropic=anthropic)
        rows.append(row)
        for adapter in model.adapters:
            name = f"{model.id}@{adapter}"
            rows.append({**row, "id": name, "display_name": name, "parent": model.id})
    return rows


def _row(model: ServedModel, *, anthropic: bool) -> dict[str, Any]:
    row = {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "optiq",
        "type": "model",
        "display_name": model.id,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if model.context:
        row |= dict.fromkeys(("max_model_len", "context_length", "max_input_tokens"), model.context)
        if anthropic:
            row["max_tokens"] = model.context
    return row


def _limit(given: str | None) -> int:
    if given is None:
        return _MAX_LIMIT
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) <= _MAX_LIMIT):
        raise RequestError(f"limit is {given[:40]!r}; give 1 to {_MAX_LIMIT}", param="limit")
    return int(given)
