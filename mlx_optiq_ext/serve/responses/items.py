"""Items of a conversation in one form: each with its kind, an id, and a list of parts where it has content.

Called by the routes before anything else, so that the store, the list of input items and the translation
speak of the same items. Knows no engine.
"""

import secrets
from collections.abc import Callable, Sequence

import msgspec

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.responses.schema import ContentPart, Item

__all__ = ["new_id", "normalized", "resolved"]

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_NEEDED = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
    "item_reference": ("id",),
}


def new_id(kind: str) -> str:
    """Make an id for an item of a kind."""
    return f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"


def normalized(given: str | Sequence[Item] | None) -> list[Item]:
    """Bring the input of a request into the one form.

    Raises:
        RequestError: An item lacks what its kind needs.
    """
    if isinstance(given, str):
        given = [Item(role="user", content=given)]
    return [_normalized(item, f"input[{index}]") for index, item in enumerate(given or ())]


def resolved(items: Sequence[Item], find: Callable[[str], Item]) -> list[Item]:
    """Put the items themselves in place of references to them.

    Args:
        items: As :func:`normalized` returns them.
        find: Gets an id, returns the item.
    Raises:
        UnknownName: What ``find`` raises.
    """
    return [find(item.id or "") if item.type == "item_reference" else item for item in items]


def _normalized(item: Item, path: str) -> Item:
    kind = item.type or ("message" if item.role is not None else "item_reference")
    for name in _NEEDED[kind]:
        if getattr(item, name) is None:
            raise RequestError(f"an item of type {kind!r} needs {name!r}", param=f"{path}.{name}")
    if kind == "item_reference":
        return msgspec.structs.replace(item, type=kind)
    content = item.content
    if isinstance(content, str):
        content = [
            ContentPart(type="output_text" if item.role == "assistant" else "input_text", text=content)
        ]
    return msgspec.structs.replace(
        item, type=kind, id=item.id or new_id(kind), status=item.status or "completed", content=content
    )
