"""The server's paths, bodies and answers as reference text, from the application itself.

Needs the extra ``serve``. Called by :mod:`mlx_optiq_ext.cli.reference`.
"""

import inspect
from collections.abc import Iterator
from typing import Any, cast

from litestar.routes import HTTPRoute

from mlx_optiq_ext import __version__
from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import EngineStatus

__all__ = ["http_reference"]


class _Described:
    """An engine that is only asked for its version."""

    def status(self) -> EngineStatus:
        return EngineStatus(state="ready", version=__version__, uptime_s=0.0, models=())


def http_reference() -> Iterator[str]:
    """Markdown lines: every path with what it takes and answers, then every type of their bodies."""
    app = create_app(cast(Engine, _Described()), ServeOptions(), None)
    document = app.openapi_schema.to_schema()
    docs = {
        (route.path_format, str(method).lower()): inspect.getdoc(handler.fn) or ""
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        for method in handler.http_methods
    }
    schemas = document.get("components", {}).get("schemas", {})
    operations = [
        (path, method, operation)
        for path, methods in sorted(document["paths"].items())
        for method, operation in methods.items()
        if method != "head" and not _is_alias(path, document["paths"])
    ]
    for path, method, operation in operations:
        yield f"- `{method.upper()} {path}`{_words(docs.get((path, method), ''), operation)}"
    yield "\nTypes of bodies and answers (`?` may be left out or null):\n"
    for name, schema in sorted(schemas.items(), key=lambda item: _short(item[0])):
        if "properties" in schema:
            yield f"- `{_short(name)}`: {_fields(schema)}"


def _is_alias(path: str, paths: Any) -> bool:
    """Whether the same is there below ``/v1``, for clients that leave it out."""
    return not path.startswith("/v1") and f"/v1{path}" in paths


def _words(doc: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = [
        answer["content"]["application/json"]["schema"]
        for status, answer in operation["responses"].items()
        if status.startswith("2") and "application/json" in answer.get("content", {})
    ]
    parts = [f": {doc.splitlines()[0]}" if doc else ""]
    if body:
        parts.append(f"Takes `{_type(body)}`.")
    parts += [f"Answers `{_type(answer)}`." for answer in answers if answer]
    return " ".join(parts).rstrip()


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    return ", ".join(
        f"`{name}{'' if name in required else '?'}` {_type(field)}".rstrip()
        for name, field in schema["properties"].items()
    )


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a word or two."""
    if "$ref" in schema:
        return _short(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " | ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in schema["enum"])
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return " | ".join(_type(each) for each in schema[many] if each.get("type") != "null")
    kind = schema.get("type", "any")
    if kind == "array":
        return f"[{_type(schema.get('items') or {})}]"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"{{name: {_type(schema['additionalProperties'])}}}"
    return " | ".join(kind) if isinstance(kind, list) else f"{kind}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    if (least is None and most is None) or abs(least or 0) > 1e9:
        return ""
    return f" {'' if least is None else f'{least:.12g}'}…{'' if most is None else f'{most:.12g}'}"


def _short(name: str) -> str:
    """A type's name; of those that several dialects have, with the dialect."""
    parts = name.split(".")
    return f"{parts[-3]}.{parts[-1]}" if len(parts) > 3 else parts[-1]
