"""From a KV configuration to the caches of a model.

Knows types and cache classes; reads no file. Called by the server, the patches and the scorer wherever
mlx-lm would call ``make_prompt_cache``.
"""

import base64
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from msgspec.structs import replace

from mlx_optiq_ext.errors import FingerprintMismatch, UsageError
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.observe import CacheMap, observe, replace_caches
from mlx_optiq_ext.kv.store import Layout
from mlx_optiq_ext.types.kv import KVConfig, KVLayer, KVSite

__all__ = ["build_caches", "decode_mean", "encode_mean", "follow_weights", "layouts", "unnamed_caches"]


def build_caches(model: nn.Module, config: KVConfig, max_kv_size: int | None = None) -> list[Any]:
    """Fresh caches of a model, stored as the configuration says.

    Args:
        model: As mlx-lm loads it.
        config: Made for this model, or for one with the same attention.
        max_kv_size: As for ``make_prompt_cache``.
    Returns:
        One cache per entry of ``make_prompt_cache(model)``; those without keys and values, or of a class
        that cannot be stored otherwise, are mlx-lm's own.
    Raises:
        FingerprintMismatch: The configuration names caches that the model does not have.
        UsageError: A group does not divide a head.
        UnsupportedModel: See :func:`~mlx_optiq_ext.kv.observe.observe`.
    """
    caches = observe(model, max_kv_size)
    found = layouts(caches, config)

    def make(index: int, member: int | None, _: Any) -> Any | None:
        layout = found.get((index, member))
        return None if layout is None else MixedKVCache(layout)

    return replace_caches(make_prompt_cache(model, max_kv_size), make)


def layouts(caches: CacheMap, config: KVConfig) -> dict[tuple[int, int | None], Layout]:
    """Storage of every cache that can be stored otherwise, by (index, member).

    Caches that the configuration does not name are kept in full precision, in our classes all the same:
    sliding layers share one mask, so they must show their columns alike.

    Raises:
        FingerprintMismatch, UsageError: As :func:`build_caches`.
    """
    pairs = _placed(caches, config)
    missing = [_what(layer) for layer, site in pairs if site is None]
    if missing:
        raise FingerprintMismatch(
            f"the KV configuration names caches {', '.join(missing)}, where this model has no keys and "
            f"values ({len(caches.sites)} caches: {', '.join(site.name for site in caches.sites)}); "
            "make one for this model with `optiq kv-cache MODEL`"
        )
    named = {site.name: layer for layer, site in pairs if site is not None}
    return {
        (site.index, site.member): _layout(
            site, named.get(site.name) or KVLayer(index=site.index, member=site.member), config, caches
        )
        for site in caches.sites
    }


def unnamed_caches(caches: CacheMap, config: KVConfig) -> tuple[str, ...]:
    """Names of the caches that the configuration says nothing of: they stay in full precision."""
    named = {site.name for _, site in _placed(caches, config) if site is not None}
    return tuple(site.name for site in caches.sites if site.name not in named)


def follow_weights(config: KVConfig, caches: CacheMap, rotated: Collection[int]) -> KVConfig:
    """The same storage for weights that rotate values themselves, or no longer do.

    A configuration measured on other weights would leave values unrotated, or turn rotated ones back.

    Args:
        config: Made for this model, or for one with the same attention.
        caches: Of the model.
        rotated: Blocks whose weights make rotated values, as config.json of the checkpoint says.
    Raises:
        FingerprintMismatch: As :func:`build_caches`.
    """
    layers = (
        replace(layer, values_rotated=site is not None and site.layer in rotated)
        for layer, site in _placed(caches, config)
    )
    return replace(config, layers=tuple(layers))


def _placed(caches: CacheMap, config: KVConfig) -> list[tuple[KVLayer, KVSite | None]]:
    """Every entry with the cache that it speaks of; None where the model has none.

    Raises:
        FingerprintMismatch: An entry names a block that fills several caches, or the configuration was made
            for other caches.
    """
    _require_same_shapes(caches, config)
    by_place = {(site.index, site.member): site for site in caches.sites}
    return [
        (
            layer,
            by_place.get((layer.index, layer.member)) if layer.index >= 0 else _site_of_block(layer, caches),
        )
        for layer in config.layers
    ]


def _require_same_shapes(caches: CacheMap, config: KVConfig) -> None:
    """Refuse a model with other caches than those the configuration was made for, where it says so.

    Raises:
        FingerprintMismatch: Another number of caches, or heads of another number or size.
    """
    if not config.sites:
        return
    made, found = ({site.name: _shape(site) for site in sites} for sites in (config.sites, caches.sites))
    if made == found:
        return
    if len(made) != len(found):
        difference = f"{len(made)} caches, this model has {len(found)}"
    else:
        name = next(name for name in made if made[name] != found.get(name))
        difference = f"{made[name]} in cache {name}, this model has {found.get(name, 'no such cache')}"
    source = config.model.source if config.model is not None else ""
    raise FingerprintMismatch(
        f"the KV configuration was made for {source or 'a model'} with {difference}; "
        "make one for this model with `optiq kv-cache MODEL`"
    )


def _shape(site: KVSite) -> str:
    values = "" if site.value_dim == site.key_dim else f" (values {site.value_dim})"
    return f"{site.heads} heads of {site.key_dim}{values}"


def _what(layer: KVLayer) -> str:
    return f"{layer.index}" if layer.index >= 0 else f"of block {layer.layer}"


def _site_of_block(layer: KVLayer, caches: CacheMap) -> KVSite | None:
    """The cache that a block fills, for entries that name blocks only; None: it has none.

    Raises:
        FingerprintMismatch: The block fills several, and the entry does not say which.
    """
    sites = [
        site for site in caches.sites if site.layer == layer.layer and layer.member in (None, site.member)
    ]
    if len(sites) > 1:
        raise FingerprintMismatch(
            f"the KV configuration has one entry for block {layer.layer}, which fills {len(sites)} caches; "
            "make one for this model with `optiq kv-cache MODEL`"
        )
    return sites[0] if sites else None


def _layout(site: KVSite, layer: KVLayer, config: KVConfig, caches: CacheMap) -> Layout:
    for name, choice, dim in (("keys", layer.k, site.key_dim), ("values", layer.v, site.value_dim)):
        if not choice.fits(dim):
            raise UsageError(
                f"{name} of cache {site.name} have {dim} numbers per head, which group "
                f"{choice.group_size} does not divide; use a group that does, or keep"
            )
    mean = decode_mean(layer.key_mean, site) if layer.key_mean else None
    return Layout(
        Codec(layer.k, site.key_dim, rotate=config.rotate and layer.k.mode != "keep", mean=mean),
        Codec(
            layer.v,
            site.value_dim,
            rotate=config.rotate and layer.v.mode != "keep",
            rotated=layer.values_rotated,
        ),
        window=site.window,
        first_kept=site.first_kept,
        recent=config.recent,
        first=config.first,
        dense=bool(caches.dense),
    )


def encode_mean(mean: mx.array) -> str:
    """Key means (H, D) as :attr:`KVLayer.key_mean` holds them."""
    return base64.b64encode(np.array(mean.astype(mx.float16)).astype("<f2").tobytes()).decode("ascii")


def decode_mean(text: str, site: KVSite) -> mx.array:
    """Key means (H, D), float32.

    Raises:
        FingerprintMismatch: Another number of heads, or of numbers per head.
    """
    numbers = np.frombuffer(base64.b64decode(text), dtype="<f2")
    if numbers.size != site.heads * site.key_dim:
        raise FingerprintMismatch(
            f"key means of cache {site.name} have {numbers.size} numbers, the model has "
            f"{site.heads} heads of {site.key_dim}; make a configuration for this model"
        )
    mean = mx.array(numbers.astype(np.float32)).reshape(site.heads, site.key_dim)
    mx.eval(mean)
    return mean
