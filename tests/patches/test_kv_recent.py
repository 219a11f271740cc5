"""What tokens kept in full precision promise when tokens are taken back, and what they do not."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_optiq_ext
from mlx_optiq_ext.types.kv import KVConfig, KVLayer
from mlx_optiq_ext.types.quant import Choice

TWO = Choice(bits=2, group_size=32)
PROMPT = [5, 80, 31, 7, 99, 12, 200, 45, 3, 61]
MORE = [17, 90, 4, 8, 150, 33]
RECENT = 6


def config(recent: int) -> KVConfig:
    layers = (KVLayer(index=0, k=TWO, v=TWO), KVLayer(index=1, k=TWO, v=TWO))
    return KVConfig(layers=layers, rotate=False, recent=recent)


@pytest.fixture
def cache_module(stock_modules):
    mlx_optiq_ext.install()
    return stock_modules["mlx_lm.models.cache"]


@pytest.fixture(scope="module")
def model(exact_llama):
    from mlx_lm import load

    return load(str(exact_llama))[0]


def fed(model, cache_module, recent, tokens, block):
    """Caches that were given tokens in blocks, and the logits behind every token."""
    cache = cache_module.make_prompt_cache(model, kv_config=config(recent))
    logits = [model(mx.array(tokens[i : i + block])[None], cache=cache) for i in range(0, len(tokens), block)]
    return cache, np.array(mx.concatenate(logits, axis=1)[0])


def first_keys(cache):
    """Keys of the first block's tokens, (T, ·): those depend on the token and its place alone."""
    keys, _ = cache[0].keys_and_values()
    return np.moveaxis(np.array(keys.numbers())[0], 1, 0).reshape(keys.numbers().shape[2], -1)


def drafted(model, cache_module, draft, recent):
    from mlx_lm.generate import speculative_generate_step

    made = [
        *cache_module.make_prompt_cache(model, kv_config=config(recent)),
        *cache_module.make_prompt_cache(draft),
    ]
    steps = speculative_generate_step(mx.array(PROMPT), model, draft, max_tokens=12, prompt_cache=made)
    return [int(token) for token, *_ in steps]


def alone(model, cache):
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=cache)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("recent", [0, 64], ids=["none", "all"])
def test_drafting_changes_no_token_where_no_token_is_recent_or_all_are(
    cache_module, model, exact_llama, recent
):
    from mlx_lm import load

    draft = load(str(exact_llama))[0]
    draft.model.layers = draft.model.layers[:1]
    found = drafted(model, cache_module, draft, recent)
    assert found == alone(model, cache_module.make_prompt_cache(model, kv_config=config(recent)))
    if recent:
        assert found == alone(model, cache_module.make_prompt_cache(model))


def test_queries_that_run_together_see_fewer_recent_tokens_than_one_by_one(cache_module, model):
    tokens = PROMPT + MORE
    for recent, is_same in ((0, True), (RECENT, False), (64, True)):
        together, one_by_one = (fed(model, cache_module, recent, tokens, block)[1] for block in (4, 1))
        assert np.allclose(together, one_by_one, atol=1e-4) is is_same
    # The tokens are held alike all the same, however they came.
    held = [first_keys(fed(model, cache_module, RECENT, tokens, block)[0]) for block in (4, 1)]
    np.testing.assert_allclose(*held, atol=1e-4)  # float32 products of four rows and of one


def test_tokens_taken_back_leave_those_before_them_packed_until_others_follow(cache_module, model):
    taken_back = 4
    straight, _ = fed(model, cache_module, RECENT, PROMPT, 1)
    detour, _ = fed(model, cache_module, RECENT, PROMPT + MORE[:taken_back], 1)
    packed, _ = fed(model, cache_module, 0, PROMPT, 1)
    for member in detour:
        assert member.trim(taken_back) == taken_back
    exact_by_then = slice(len(PROMPT) - RECENT, len(PROMPT) - RECENT + taken_back)
    found, wanted = first_keys(detour), first_keys(straight)
    assert np.abs(found - wanted)[exact_by_then].max(axis=1).min() > 1e-3
    np.testing.assert_allclose(found[exact_by_then], first_keys(packed)[exact_by_then], atol=1e-6)
    found[exact_by_then] = wanted[exact_by_then] = 0
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # As many tokens as are recent: what was lost has left the window.
    for cache in (straight, detour):
        for token in MORE[:RECENT]:
            model(mx.array([[token]]), cache=cache)
    np.testing.assert_allclose(first_keys(detour), first_keys(straight), atol=1e-6)
