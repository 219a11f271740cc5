"""Keys, values and their gradients, layer by layer, from one recorded forward pass.

Stands in for a model's caches with objects that hand every tensor on and let a tap see it. Knows nothing of
storage. Called by ``sensitivity``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import create_attention_mask, make_prompt_cache

from mlx_optiq_ext.kv.observe import CacheMap, all_caches
from mlx_optiq_ext.models.reverse import Reverse
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.taps import Call, UnitTap
from mlx_optiq_ext.models.walk import Quantizable
from mlx_optiq_ext.types.kv import KVSite

__all__ = ["CacheReverse", "cache_tape", "tensor_name"]


def tensor_name(site: KVSite, tensor: str) -> str:
    """Name of one cache's keys or values among captures: ``3.k``."""
    return f"{site.name}.{tensor}"


class _Switch:
    """Where the caches find the tap of the moment."""

    __slots__ = ("tap",)

    def __init__(self) -> None:
        self.tap: UnitTap | None = None


class _WatchedCache:
    """A cache for one block of tokens from the start: keeps nothing, shows everything to the tap.

    Has no ``__dict__``, so recording and replaying a block's arguments leaves it alone.
    """

    __slots__ = ("offset", "site", "switch")

    def __init__(self, site: KVSite, switch: _Switch) -> None:
        self.site, self.switch, self.offset = site, switch, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        tap = self.switch.tap
        if tap is None:
            return keys, values
        return _note(tap, tensor_name(self.site, "k"), keys), _note(tap, tensor_name(self.site, "v"), values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        window = window_size or self.site.window
        if window is not None and window >= N:
            window = None
        return create_attention_mask(N, 0, return_array, window)


def cache_tape(model: nn.Module, caches: CacheMap, tokens: mx.array) -> tuple[Tape, _Switch]:
    """A tape of the model with watched caches; :meth:`Tape.forward` comes next.

    Args:
        model: Weights resident, float32 where the back end needs it.
        tokens: int (W, T).
    """
    switch = _Switch()
    sites = {(site.index, site.member): site for site in caches.sites}
    found: list[Any] = [None] * len(make_prompt_cache(model))
    members: dict[int, dict[int, Any]] = {}
    for index, member, _ in all_caches(make_prompt_cache(model)):
        site = sites.get((index, member))
        watched = None if site is None else _WatchedCache(site, switch)
        if member is None:
            found[index] = watched
        else:
            members.setdefault(index, {})[member] = watched
    for index, inner in members.items():
        found[index] = tuple(inner.values())
    run: Any = model
    return Tape(model, tokens, call=lambda batch: run(batch, cache=found)), switch


class CacheReverse(Reverse):
    """A reverse pass that captures keys and values instead of a block's projections.

    Args:
        tape, switch: From :func:`cache_tape`.
        cotangent, samples: As for :class:`Reverse`.
    """

    def __init__(self, tape: Tape, switch: _Switch, cotangent: Any, samples: int = 1) -> None:
        super().__init__(tape, cotangent, samples)
        self._switch = switch

    def _tapped(self, members: list[Quantizable], tap: UnitTap) -> AbstractContextManager[None]:  # noqa: ARG002
        @contextmanager
        def switched() -> Iterator[None]:
            self._switch.tap = tap
            try:
                yield
            finally:
                self._switch.tap = None

        return switched()


def _note(tap: UnitTap, name: str, x: mx.array) -> mx.array:
    """Note a tensor as a call whose input it is, and add the tap's delta."""
    return tap.add(Call(name, copy(x), None, False, False), x)
