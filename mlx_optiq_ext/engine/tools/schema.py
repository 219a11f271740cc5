"""What a tool's JSON schema says of one value, and bringing the value there where nothing is lost.

Knows nothing of call syntaxes; used by the readers of calls.
"""

import json
from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["coerce", "properties_of", "types_of"]

_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}


def properties_of(tool: ToolSpec | None) -> Mapping[str, Any]:
    """Schemas of a tool's arguments by name; empty where there are none."""
    properties = tool.parameters.get("properties") if tool is not None else None
    return properties if isinstance(properties, dict) else {}


def types_of(schema: Any) -> frozenset[str]:
    """JSON types that a schema names, of all its alternatives; empty: any."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {each for each in named or () if isinstance(each, str)}
    for either in ("anyOf", "oneOf"):
        branches = schema.get(either)
        if isinstance(branches, list):
            found = [types_of(branch) for branch in branches]
            if not all(found):
                return frozenset()
            types.update(*found)
    return frozenset(types)


def coerce(value: Any, schema: Any) -> Any:
    """The value in a type that the schema allows, or as it is where that would lose something.

    Args:
        value: A JSON value.
        schema: Schema of the property; anything else than an object allows all.
    Returns:
        ``"5"`` as 5 for an integer, ``"[1]"`` as a list for an array, 5 as ``"5"`` for a string, 5.0 as 5 for
        an integer; everything else unchanged.
    """
    types = types_of(schema)
    if not types:
        return value
    if isinstance(value, str):
        return value if "string" in types else _from_text(value, types)
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return value
    if types == {"string"}:
        return json.dumps(value)
    if isinstance(value, float) and "number" not in types and "integer" in types and value.is_integer():
        return int(value)
    return value


def _from_text(text: str, types: frozenset[str]) -> Any:
    word = text.strip().lower()
    try:
        value = _WORDS[word] if word in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and value.is_integer() and "number" not in types:
        value = int(value)
    return value if _type_of(value) & types else text


def _type_of(value: Any) -> frozenset[str]:
    for kind, name in ((bool, "boolean"), (dict, "object"), (list, "array"), (str, "string")):
        if isinstance(value, kind):
            return frozenset({name})
    if value is None:
        return frozenset({"null"})
    return frozenset({"integer", "number"}) if isinstance(value, int) else frozenset({"number"})
