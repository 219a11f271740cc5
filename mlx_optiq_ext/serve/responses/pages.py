"""A page of items, as lists of the OpenAI API are read: by limit, order and the last id seen."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.responses.schema import Item

__all__ = ["page_of"]

DEFAULT_LIMIT = 20
MAX_LIMIT = 100


def page_of(items: Sequence[Item], query: Mapping[str, Any]) -> dict[str, Any]:
    """Cut one page.

    Args:
        items: All of them, oldest first.
        query: ``limit`` (1 to 100, default 20), ``order`` (``desc`` unless ``asc``), ``after`` (an id).
    Raises:
        RequestError: One of these has no such value.
    """
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order is {order!r}; it can be asc or desc", param="order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        places = [place for place, item in enumerate(ordered) if item.id == after]
        if not places:
            raise RequestError(f"after is {after!r}, which is not among the items", param="after")
        ordered = ordered[places[0] + 1 :]
    limit = _limit(query.get("limit", str(DEFAULT_LIMIT)))
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": len(ordered) > limit,
    }


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_LIMIT):
        raise RequestError(f"limit is {text!r}; it can be 1 to {MAX_LIMIT}", param="limit")
    return int(text)
