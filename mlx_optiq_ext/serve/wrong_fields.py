"""What is wrong with a field, in words for the user who wrote it: what is expected there, and what was found.

From msgspec's own words, which name Python's types and do not list the values of a choice. Knows schemas and
no dialect. Called by ``body``.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from mlx_optiq_ext.errors import RequestError

__all__ = ["field_error", "path_of"]

_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
_EXPECTED = re.compile(r"Expected `([^`]*)`([^`]*)(?:, got `([^`]*)`)?")
_MAX_VALUE = 80
_ZERO = re.compile(r"\.0$")
_NOUNS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
}


def path_of(error: msgspec.ValidationError) -> str:
    """Path of the field to blame, like ``messages[0].role``; empty for the body itself."""
    place = _PLACE.search(str(error))
    return place.group(1) if place else ""


def field_error(error: msgspec.ValidationError, data: bytes | str, kind: Any) -> RequestError:
    """The error that a client is told.

    Args:
        error: From decoding a body.
        data: The body.
        kind: What it was decoded as.
    """
    path, said = path_of(error), _PLACE.sub("", str(error))
    if missing := _MISSING.fullmatch(said):
        return RequestError("is missing", param=f"{path}.{missing[1]}".lstrip("."))
    if value := _VALUE.fullmatch(said):
        choices = [*_choices(data, kind, path)]
        said = f"{value[1][:_MAX_VALUE]} is not {_listed(choices) or 'a value that this field takes'}"
    elif expected := _EXPECTED.fullmatch(said):
        nouns = _listed([_noun(name) for name in expected[1].split(" | ")])
        said = f"expected {nouns}{_ZERO.sub('', expected[2].rstrip(','))}"
        if expected[3]:
            said += f", got {_found(expected[3], expected[1])}"
    return RequestError(said if path else f"the body: {said}", param=path or None)


def _noun(name: str) -> str:
    return _NOUNS.get(name, name)


def _found(name: str, expected: str) -> str:
    return "a decimal number" if name == "float" and "int" in expected else _noun(name)


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)


def _choices(data: bytes | str, kind: Any, path: str) -> Iterator[str]:
    """What a field that holds one of several values takes."""
    steps = _STEP.findall(path)
    nodes, value = list(_alternatives(_described(kind))), _decoded(data)
    for step in steps[:-1]:
        nodes = [found for node in nodes for child in _children(node, step) for found in _alternatives(child)]
        value = _child(value, step)
        nodes = [node for node in nodes if _is_meant(node, value)] or nodes
    for node in nodes:
        if isinstance(node, inspect.StructType) and node.tag_field == steps[-1]:
            yield repr(node.tag)
        for child in _children(node, steps[-1]):
            for found in _alternatives(child):
                if isinstance(found, inspect.LiteralType):
                    yield from map(repr, found.values)
                elif isinstance(found, inspect.StructType):
                    yield "an object"


def _decoded(data: bytes | str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):  # wrong behind the wrong field too
        return None


def _child(value: Any, step: str) -> Any:
    try:
        return value[int(step[1:-1])] if step.startswith("[") else value[step]
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _is_meant(node: inspect.Type, value: Any) -> bool:
    """Whether a value says by its tag that it is this one of several objects."""
    return (
        isinstance(node, inspect.StructType)
        and isinstance(value, dict)
        and node.tag_field is not None
        and value.get(node.tag_field) == node.tag
    )


@cache
def _described(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _alternatives(node: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(node, inspect.Metadata):
        yield from _alternatives(node.type)
    elif isinstance(node, inspect.UnionType):
        for each in node.types:
            yield from _alternatives(each)
    else:
        yield node


def _children(node: inspect.Type, step: str) -> Iterator[inspect.Type]:
    if isinstance(node, inspect.StructType):
        yield from (field.type for field in node.fields if field.encode_name == step)
    elif isinstance(node, inspect.ListType):
        yield node.item_type
    elif isinstance(node, inspect.DictType):
        yield node.value_type
