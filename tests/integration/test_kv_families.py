"""Every family of mlx-lm with our caches: stock logits in full precision, packed rows that batch."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import base
from mlx_lm.models.cache import make_prompt_cache
from support_families import FAMILIES, tiny_family

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.kv.build import build_caches
from mlx_optiq_ext.kv.cache import MixedKVCache
from mlx_optiq_ext.kv.observe import CacheMap, all_caches, observe
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import KEEP, Choice

REFUSED = {
    "bitnet": "does not run on a few tokens with its own caches",  # needs Metal
    "muse_spark": "does not run on a few tokens with its own caches",  # needs Metal
    "deepseek_v41": "no cache of keys and values",  # classes of its own, inside ArraysCache
    "mamba": "no cache of keys and values",
    "mamba2": "no cache of keys and values",
    "rwkv7": "no cache of keys and values",
}
LEFT_AS_THEY_ARE = {
    "llama4": "ChunkedKVCache is not stored otherwise",
    "deepseek_v32": "keys of an indexer",
    "glm_moe_dsa": "keys of an indexer",
    "minimax_m3_vl": "keys of an indexer",
}
STOCK_CANNOT_BATCH = {
    "gemma2": "a mask per row does not fit its grouped queries",
    "phi3small": "a mask per row does not fit its grouped queries",
    "gpt_bigcode": "one position for all rows",
    "llama4": "ChunkedKVCache does not merge",
    "baichuan_m1": "rows differ from rows alone: its convolution sees the padding",
    "recurrent_gemma": "rows differ: recurrent state sees the padding",
    "bailing_moe_linear": "rows differ: recurrent state sees the padding",
    "jamba": "rows differ: recurrent state sees the padding",
    "nemotron_h": "rows differ: recurrent state sees the padding",
    "olmo_hybrid": "rows differ: recurrent state sees the padding",
    "longcat_flash_ngram": "rows differ: n-grams see the padding",
    "minimax_m3_vl": "rows differ: blocks of keys are cut over columns, padding included",
}
WINDOWED = ("gemma3", "gemma4", "gpt_oss", "cohere2", "mimo_v2_flash", "step3p5")
DENSE = ("deepseek_v3", "gemma2", "kimi_linear", "stablelm", "plamo2", "mistral4")
SUPPORTED = [name for name in FAMILIES if name not in REFUSED]
RAGGED = (5, 23, 40, 11)
TOKENS = 6
TIE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    mlx_optiq_ext.install()
    assert hasattr(base.scaled_dot_product_attention, "_mlx_optiq_ext")
    yield
    _hook.uninstall()


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_without_storable_caches_is_refused_with_the_reason(name: str) -> None:
    model, _ = tiny_family(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        observe(model)


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_left_as_it_is_is_said(name: str) -> None:
    caches = observe(tiny_family(name)[0])
    assert caches.sites
    assert any(site.window for site in caches.sites) or name not in WINDOWED
    assert bool(caches.dense) or name not in DENSE
    reasons = [reason for _, reason in caches.refused]
    if name in LEFT_AS_THEY_ARE:
        assert LEFT_AS_THEY_ARE[name] in reasons[0]
    else:
        assert not reasons


@pytest.mark.parametrize("name", SUPPORTED)
def test_full_precision_in_our_caches_gives_stock_logits(name: str) -> None:
    model, caches = _float32(name)
    config = _config(caches, KEEP, KEEP)
    stock = _logits(model, make_prompt_cache(model))
    ours = build_caches(model, config)
    got = _logits(model, ours)
    # Sliding caches hold their columns in another order, so float32 sums differ in the last digits.
    limit = 2e-5 if any(site.window for site in caches.sites) else 0.0
    np.testing.assert_allclose(got, stock, rtol=0, atol=limit)
    kinds = {(index, member): type(cache) for index, member, cache in all_caches(ours)}
    assert all(kinds[site.index, site.member] is MixedKVCache for site in caches.sites)


@pytest.mark.parametrize("ends", [{}, {"recent": 6, "first": 2}], ids=["packed", "exact-ends"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_rows_joined_in_flight_continue_as_they_would_alone(name: str, ends: dict[str, int]) -> None:
    model, caches = _float32(name)
    key, value = (Choice(bits=bits, group_size=32) for bits in (4, 3))
    config = _config(caches, key, value, **ends)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, length).tolist() for length in RAGGED]
    if name in STOCK_CANNOT_BATCH:
        alike, _ = _like_alone(model, prompts, lambda: make_prompt_cache(model))
        assert not alike, "mlx-lm can by now; so ours has to"
    else:
        alike, why = _like_alone(model, prompts, lambda: build_caches(model, config))
        assert alike, why


def _like_alone(model: Any, prompts: list[list[int]], make: Callable[[], Any]) -> tuple[bool, str]:
    """Whether rows that join a running batch get the logits that they get alone, and what happened."""
    try:
        together = _generate(model, prompts, make, first=2)
    except Exception as error:  # noqa: BLE001  whatever a family's code raises on a batch
        return False, repr(error)
    for prompt, (tokens, scores) in zip(prompts, together, strict=True):
        ((alone, alone_scores),) = _generate(model, [prompt], make, first=1)
        for step, (one, other) in enumerate(zip(alone, tokens, strict=True)):
            if one == other:
                continue
            # Random weights make near ties, which another order of sums may break: alike up to the first.
            margin = alone_scores[step][one] - alone_scores[step][other]
            if margin > TIE:
                drift = np.abs(alone_scores[step] - scores[step]).max()
                return False, f"prompt of {len(prompt)}, token {step}: margin {margin:.1e}, drift {drift:.1e}"
            break
    return True, ""


def _generate(
    model: Any, prompts: list[list[int]], make: Callable[[], Any], first: int
) -> list[tuple[list[int], list[np.ndarray]]]:
    """Greedy tokens and log-probabilities per prompt; those behind the ``first`` join while it runs."""
    generator = BatchGenerator(
        model, max_tokens=TOKENS, prefill_step_size=16, completion_batch_size=8, prefill_batch_size=4
    )
    uids = _insert(generator, prompts[:first], make)
    found: dict[int, list[tuple[int, np.ndarray]]] = {}
    for turn in range(100):
        if turn == 5:
            uids += _insert(generator, prompts[first:], make)
        _, responses = generator.next()
        for response in responses:
            score = np.array(response.logprobs.astype(mx.float32))
            found.setdefault(response.uid, []).append((response.token, score))
        if turn > 5 and len(found) == len(prompts) and all(len(x) >= TOKENS for x in found.values()):
            break
    return [([token for token, _ in found[uid]], [score for _, score in found[uid]]) for uid in uids]


def _insert(generator: Any, prompts: list[list[int]], make: Callable[[], Any]) -> list[int]:
    if not prompts:
        return []
    uids: list[int] = generator.insert(
        prompts, max_tokens=[TOKENS] * len(prompts), caches=[make() for _ in prompts]
    )
    return uids


def _float32(name: str) -> tuple[Any, CacheMap]:
    model, _ = tiny_family(name)
    model.set_dtype(mx.float32)
    return model, observe(model)


def _config(caches: CacheMap, key: Choice, value: Choice, **ends: int) -> KVConfig:
    """These choices wherever the group divides the head."""
    layers = [
        KVLayer(
            index=site.index,
            member=site.member,
            k=key if key.fits(site.key_dim) else KEEP,
            v=value if value.fits(site.value_dim) else KEEP,
        )
        for site in caches.sites
    ]
    return KVConfig(layers=tuple(layers), **ends)


def _logits(model: Any, caches: list[Any]) -> np.ndarray:
    """Of a prefill of 20 tokens, a block of 5 and single ones up to 40."""
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (1, 40)))
    cuts = [0, 20, *range(25, 41)]
    pieces = [model(tokens[:, a:b], cache=caches) for a, b in itertools.pairwise(cuts)]
    return np.array(mx.concatenate([getattr(piece, "logits", piece) for piece in pieces], axis=1))
