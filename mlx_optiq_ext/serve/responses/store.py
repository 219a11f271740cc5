"""Responses that later requests go on from, kept in memory within limits.

Knows items and the JSON of responses; nothing of HTTP or of the engine. Used by the routes, on their thread.
"""

import logging
from collections import OrderedDict
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UnknownName
from mlx_optiq_ext.serve.responses.schema import Item

__all__ = ["ResponseStore", "StoredResponse"]

_log = logging.getLogger(__name__)


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One response with the request's own items, both as JSON."""

    id: str
    previous: str | None
    input: bytes
    response: bytes

    @property
    def nbytes(self) -> int:
        """Bytes that it counts for."""
        return len(self.input) + len(self.response)

    def input_items(self) -> list[Item]:
        """The items that its request brought."""
        return msgspec.json.decode(self.input, type=list[Item])

    def output_items(self) -> list[Item]:
        """The items of its answer."""
        return msgspec.json.decode(self.response, type=_Output).output


class _Output(msgspec.Struct, frozen=True, kw_only=True):
    output: list[Item]


class ResponseStore:
    """The responses that were used last; what a conversation goes on from counts as used with it.

    Args:
        max_nbytes: Of all of them, as JSON.
        max_responses: How many.
    """

    def __init__(self, max_nbytes: int = 64 << 20, max_responses: int = 1024) -> None:
        self._max_nbytes = max_nbytes
        self._max_responses = max_responses
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def put(self, response: dict[str, Any], own: list[Item]) -> None:
        """Keep a response that has ended; the ones used longest ago make room."""
        stored = StoredResponse(
            id=response["id"],
            previous=response["previous_response_id"],
            input=msgspec.json.encode(own),
            response=msgspec.json.encode(response),
        )
        self._responses[stored.id] = stored
        self.nbytes += stored.nbytes
        while len(self._responses) > self._max_responses or self.nbytes > self._max_nbytes:
            oldest = next(iter(self._responses))
            _log.debug("response %s makes room for %s", oldest, stored.id)
            self.delete(oldest)

    def get(self, name: str) -> StoredResponse:
        """Look one up by its id, and count it as used.

        Raises:
            UnknownName: It was never stored, or is gone.
        """
        if name not in self._responses:
            raise UnknownName(f"no response {name!r} is stored here", param="response_id")
        self._responses.move_to_end(name)
        return self._responses[name]

    def delete(self, name: str) -> None:
        """Forget one.

        Raises:
            UnknownName: It was never stored, or is gone.
        """
        self.nbytes -= self.get(name).nbytes
        del self._responses[name]

    def items_before(self, name: str | None) -> list[Item]:
        """All items of the conversation up to and with a response, oldest first.

        Raises:
            UnknownName: It, or one that it goes on from, is not stored.
        """
        chain: list[StoredResponse] = []
        while name is not None:
            if name not in self._responses:
                raise UnknownName(
                    f"no response {name!r} is stored here; send the whole conversation as input",
                    param="previous_response_id",
                )
            chain.append(self.get(name))
            name = chain[-1].previous
        return [item for each in reversed(chain) for item in (*each.input_items(), *each.output_items())]

    def item(self, name: str) -> Item:
        """Look up one item of any response by its id.

        Raises:
            UnknownName: No stored response has it.
        """
        written = msgspec.json.encode(name)
        for stored in reversed(self._responses.values()):
            if written in stored.input or written in stored.response:
                for item in (*stored.input_items(), *stored.output_items()):
                    if item.id == name:
                        return item
        raise UnknownName(f"no item {name!r} is stored here", param="input")
