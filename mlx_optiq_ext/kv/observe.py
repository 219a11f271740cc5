"""Which caches a model has, what flows into them, and how their content is read.

Runs the model's own code on a few tokens without evaluating anything, so it costs no arithmetic and knows no
family. Called by ``build`` and by the measurement.
"""

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.store import Layout
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.types.kv import KVSite, cache_name
from mlx_optiq_ext.types.quant import KEEP

__all__ = ["CacheMap", "all_caches", "observe", "replace_caches", "run_lazily"]

_FIRST_TOKENS = 3


class CacheMap(msgspec.Struct, frozen=True, kw_only=True):
    """The caches of one model."""

    sites: tuple[KVSite, ...]
    """Those that hold keys and values and can be stored otherwise."""
    refused: tuple[tuple[str, str], ...]
    """(cache, reason) of those that are left as they are; state-space caches are not among them."""
    dense: str = ""
    """Why restored arrays have to be handed to the model; empty: it takes stored ones."""


def observe(model: nn.Module, max_kv_size: int | None = None) -> CacheMap:
    """Find the caches of a model; cheap, evaluates nothing, remembered per model.

    Args:
        model: As mlx-lm loads it; weights may be lazy.
        max_kv_size: As for ``make_prompt_cache``.
    Raises:
        UnsupportedModel: The model does not run with its own caches, or caches no keys and values.
    """
    key = (id(model), max_kv_size)
    known = _KNOWN.get(key)
    if known is not None and known[0]() is model:
        return known[1]
    found = _observe(model, max_kv_size)
    for stale in [entry for entry, (of, _) in _KNOWN.items() if of() is None]:
        del _KNOWN[stale]
    _KNOWN[key] = (weakref.ref(model), found)
    return found


_KNOWN: dict[tuple[int, int | None], tuple[Callable[[], Any], CacheMap]] = {}


def all_caches(caches: Sequence[Any]) -> Iterator[tuple[int, int | None, Any]]:
    """(index, member, cache) of every cache, those within a ``CacheList`` one by one."""
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            for member, inner in enumerate(cache.caches):
                yield index, member, inner
        else:
            yield index, None, cache


def replace_caches(caches: list[Any], make: Callable[[int, int | None, Any], Any | None]) -> list[Any]:
    """A copy of a list of caches where ``make(index, member, cache)`` answered something else than None."""
    made = {(i, m): make(i, m, cache) for i, m, cache in all_caches(caches)}
    replaced: list[Any] = []
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            inner = [made[index, m] or old for m, old in enumerate(cache.caches)]
            replaced.append(CacheList(*inner))
        else:
            replaced.append(made[index, None] or cache)
    return replaced


def run_lazily(model: nn.Module, caches: list[Any]) -> None:
    """A first block of tokens and one more, through the model's own code; nothing is evaluated."""
    run: Any = model
    run(mx.zeros((1, _FIRST_TOKENS), dtype=mx.int32), cache=caches)
    run(mx.zeros((1, 1), dtype=mx.int32), cache=caches)


def _observe(model: nn.Module, max_kv_size: int | None) -> CacheMap:
    notes = _Notes()
    stock = make_prompt_cache(model, max_kv_size)
    kinds = {(i, m): type(cache) for i, m, cache in all_caches(stock)}
    spies = replace_caches(stock, lambda i, m, cache: _spy(cache, notes, (i, m)))
    try:
        with _layers_noted(model, notes):
            run_lazily(model, spies)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__module__}: the model does not run on a few tokens with its own caches "
            f"({error}); nothing can be said about its KV cache"
        ) from error
    found = [notes.site(where, cache) for where, cache in _spied(spies) if where in notes.shapes]
    sites = tuple(site for site in found if site.value_dim)
    refused = tuple(
        (cache_name(i, m), f"{kind.__name__} is not stored otherwise; left as it is")
        for (i, m), kind in kinds.items()
        if kind not in (KVCache, RotatingKVCache) and hasattr(kind, "update_and_fetch")
    ) + tuple(
        (site.name, "keys of an indexer, on which the model itself computes; left as they are")
        for site in found
        if not site.value_dim
    )
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__module__}: no cache of keys and values that could be stored otherwise; "
            + (
                "; ".join(f"cache {name}: {why}" for name, why in refused)
                or "none is a KVCache or a RotatingKVCache"
            )
        )
    return CacheMap(sites=sites, refused=refused, dense=_why_dense(model, max_kv_size, sites))


class _Notes:
    """What the caches saw."""

    def __init__(self) -> None:
        self.layer: int | None = None
        self.shapes: dict[tuple[int, int | None], tuple[int | None, tuple[int, ...], tuple[int, ...]]] = {}

    def site(self, where: tuple[int, int | None], cache: Any) -> KVSite:
        layer, keys, values = self.shapes[where]
        sliding = isinstance(cache, RotatingKVCache)
        return KVSite(
            index=where[0],
            member=where[1],
            layer=layer,
            heads=keys[1],
            key_dim=keys[3],
            value_dim=values[3],
            window=cache.max_size if sliding else None,
            first_kept=cache.keep if sliding else 0,
        )


def _spy(cache: Any, notes: _Notes, where: tuple[int, int | None]) -> Any | None:
    """A cache of the same class that notes what it is given; None for classes that are left alone."""
    kind = type(cache)
    if kind not in (KVCache, RotatingKVCache):
        return None

    class Spy(kind):  # type: ignore[misc,valid-type]
        spied = where

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            is_indexer = values is keys and where[1] is not None
            value_shape = (*keys.shape[:3], 0) if is_indexer else values.shape
            notes.shapes.setdefault(where, (notes.layer, keys.shape, value_shape))
            return super().update_and_fetch(keys, values)

    spy = Spy.__new__(Spy)
    spy.__dict__.update(cache.__dict__)
    return spy


def _spied(caches: list[Any]) -> Iterator[tuple[tuple[int, int | None], Any]]:
    for _, _, cache in all_caches(caches):
        if hasattr(cache, "spied"):
            yield cache.spied, cache


@contextlib.contextmanager
def _layers_noted(model: nn.Module, notes: _Notes) -> Iterator[None]:
    """Keep the running block's number in ``notes``."""
    modules = find_blocks(model).modules
    numbers = {id(module): number for number, module in enumerate(modules)}

    def run(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, notes.layer = notes.layer, numbers[id(module)]
        try:
            return original(*args, **kwargs)
        finally:
            notes.layer = before

    with intercepted(modules, run):
        yield


def _why_dense(model: nn.Module, max_kv_size: int | None, sites: tuple[KVSite, ...]) -> str:
    """Try whether the model takes stored keys and values; the reason where it does not.

    Raises:
        UnsupportedModel: It takes restored arrays from our caches neither.
    """
    try:
        run_lazily(model, _plain(model, max_kv_size, sites, dense=False))
    except Exception as error:  # noqa: BLE001  whatever a family's code raises on what is no array
        reason = re.split(r"[:.(\n]", str(error), maxsplit=1)[0].strip() or type(error).__name__
    else:
        return ""
    try:
        run_lazily(model, _plain(model, max_kv_size, sites, dense=True))
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__module__}: the model reaches into its caches ({error}), which only its own "
            "cache classes bear; use full-precision KV"
        ) from error
    return f"the model computes on cached keys or values itself ({reason})"


def _plain(model: nn.Module, max_kv_size: int | None, sites: tuple[KVSite, ...], *, dense: bool) -> list[Any]:
    """Our caches at every site, in full precision."""
    by_place = {(site.index, site.member): site for site in sites}

    def make(index: int, member: int | None, _: Any) -> Any | None:
        site = by_place.get((index, member))
        if site is None:
            return None
        layout = Layout(
            Codec(KEEP, site.key_dim),
            Codec(KEEP, site.value_dim),
            window=site.window,
            first_kept=site.first_kept,
            dense=dense,
        )
        return MixedKVCache(layout)

    return replace_caches(make_prompt_cache(model, max_kv_size), make)
