"""How many bytes rows will take, before they take them.

Runs the model's own code on its own caches without evaluating anything, so it is right for any family and any
KV storage. Called by ``served`` and ``schedule``.
"""

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.allocate.size import head_room_nbytes

__all__ = ["CacheSizes", "default_limit_nbytes", "least_limit", "server_head_room_nbytes"]

_SHARE = 0.75
_HEAD_ROOM_LEAST = 128_000_000


class CacheSizes:
    """Bytes of one row's caches by length.

    Args:
        model: Loaded.
        fresh_caches: Makes a row's caches.
    """

    def __init__(self, model: nn.Module, fresh_caches: Callable[[], list[Any]]) -> None:
        self._model = model
        self._fresh = fresh_caches
        self._known: dict[int, int] = {}

    def nbytes(self, num_tokens: int) -> int:
        """Bytes after ``num_tokens``; between powers of two on a straight line, so never less than true
        where windows slide by more than the line's error."""
        if num_tokens <= 0:
            return 0
        low = 1 << (num_tokens.bit_length() - 1)
        if low == num_tokens:
            return self._at(low)
        below, above = self._at(low), self._at(2 * low)
        return below + (above - below) * (num_tokens - low) // low

    def tokens_within(self, nbytes: int, most: int) -> int:
        """The longest row, at most ``most`` tokens, that takes no more than ``nbytes``."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.nbytes(middle) <= nbytes else (low, middle - 1)
        return low

    def _at(self, num_tokens: int) -> int:
        if num_tokens not in self._known:
            caches = self._fresh()
            run: Any = self._model
            run(mx.zeros((1, num_tokens), dtype=mx.int32), cache=caches)
            self._known[num_tokens] = sum(cache.nbytes for cache in caches)
        return self._known[num_tokens]


def default_limit_nbytes() -> int:
    """Three quarters of the memory; on Apple silicon what the system recommends for its GPU, if less."""
    info = mx.device_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min(memory, int(info.get("memory_size", memory)))
    limit = int(memory * _SHARE)
    recommended = int(info.get("max_recommended_working_set_size", limit))
    return min(limit, recommended) if recommended > 0 else limit


def server_head_room_nbytes(limit: int) -> int:
    """What a server leaves for activations: a tenth of its limit, at least 128 MB."""
    return head_room_nbytes(limit, _HEAD_ROOM_LEAST)


def least_limit(nbytes: int) -> str:
    """The least ``--memory`` of a server that is to hold ``nbytes``, as it can be typed: ``230MB``."""
    limit = nbytes + _HEAD_ROOM_LEAST
    while limit - server_head_room_nbytes(limit) < nbytes:
        limit += max(nbytes // 100, 1)
    return f"{-(-limit // 1_000_000)}MB"
