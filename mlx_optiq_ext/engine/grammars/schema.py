"""What a JSON schema says of a tool's arguments, as far as a syntax that is not JSON has to know it."""

from collections.abc import Iterable
from typing import Any

import msgspec

from mlx_optiq_ext.engine.grammars.lark import ANYTHING, searched

__all__ = [
    "ALL_KINDS",
    "Parameter",
    "arguments_schema",
    "kinds",
    "parameters",
    "resolved",
    "string_terminal",
    "string_words",
]

ALL_KINDS = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_DEFINITIONS = ("$defs", "definitions")
_OTHERS = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One argument of a tool."""

    name: str
    schema: Any
    """Complete by itself: definitions that it refers to are in it."""
    is_required: bool


def arguments_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Schema of all arguments: an object, of the listed ones only unless the schema speaks of others."""
    listed = "properties" in schema and not any(word in schema for word in _OTHERS)
    return {"type": "object", **({"additionalProperties": False} if listed else {}), **schema}


def parameters(schema: dict[str, Any]) -> list[Parameter] | None:
    """Arguments in the order of the schema; None where it is more than a list of properties."""
    found = resolved(arguments_schema(schema), schema)
    if any(word in found for word in ("anyOf", "oneOf", "allOf", "$ref")):
        return None
    if not found.get("properties"):
        return [] if found.get("additionalProperties") is False or "properties" in found else None
    required = set(found.get("required") or ())
    return [
        Parameter(name=name, schema=_complete(each, schema), is_required=name in required)
        for name, each in found["properties"].items()
    ]


def kinds(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """Types of JSON values that a schema allows, as far as it says so in its types and values.

    Args:
        schema: JSON schema.
        root: Where its references lead.
    """
    schema = resolved(schema, root)
    if not isinstance(schema, dict) or depth > 16:
        return ALL_KINDS
    if "const" in schema or "enum" in schema:
        return frozenset(_kind(value) for value in schema.get("enum", [schema.get("const")]))
    said = schema.get("type", ALL_KINDS)
    found = frozenset([said] if isinstance(said, str) else said)
    for word in ("anyOf", "oneOf"):
        if schema.get(word):
            found &= _union(kinds(each, root, depth + 1) for each in schema[word])
    for each in schema.get("allOf") or ():
        found &= kinds(each, root, depth + 1)
    return found | {"integer"} if "number" in found else found


def resolved(schema: Any, root: Any) -> Any:
    """A schema, or what it refers to within the same document."""
    for _ in range(16):
        if not isinstance(schema, dict) or not str(schema.get("$ref", "")).startswith("#"):
            break
        found = root
        for step in schema["$ref"].lstrip("#/").split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, dict) and step else found
        if not isinstance(found, dict):
            break
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


def string_terminal(schema: Any) -> str:
    """Terminal of the strings that a schema allows."""
    if not isinstance(schema, dict):
        return ANYTHING
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    terminal = f"/(?s:.{{{least},{most}}})/" if least or most != "" else ANYTHING
    return f"{terminal} & {searched(schema['pattern'])}" if "pattern" in schema else terminal


def string_words(schema: Any) -> list[str] | None:
    """The only strings that are allowed, if there are such."""
    if not isinstance(schema, dict) or not ("enum" in schema or "const" in schema):
        return None
    return [value for value in schema.get("enum", [schema.get("const")]) if isinstance(value, str)]


def _complete(schema: Any, root: dict[str, Any]) -> Any:
    if not isinstance(schema, dict):
        return schema
    return {**{name: root[name] for name in _DEFINITIONS if name in root}, **schema}


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
