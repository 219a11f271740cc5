"""Vectors of texts: what they are, and that company and length do not change them."""

import mlx.core as mx
import numpy as np
import pytest
from support_families import tiny_family
from support_models import tiny_model

from mlx_optiq_ext.engine import embed as module
from mlx_optiq_ext.engine.embed import embed
from mlx_optiq_ext.errors import RequestError, UnsupportedModel

_INPUTS = [
    [5, 6, 7],
    [1] * 3 + list(range(40)),
    [9],
    list(range(100, 117)),
    [3, 4],
    *([[n, n] for n in range(8)]),
]


def test_a_vector_is_the_mean_of_the_states_before_the_head() -> None:
    model = tiny_model(dtype=mx.float32)
    for tokens, vector in zip(_INPUTS, embed(model, _INPUTS), strict=True):
        mean = np.array(mx.mean(model.model(mx.array([tokens]))[0], axis=0))
        # float32 sums of 40 terms
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma3", "mamba2", "gpt_oss", "lfm2"])
def test_company_and_chunks_do_not_change_a_vector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_family(name)
    model.set_dtype(mx.float32)
    alone = [embed(model, [tokens])[0] for tokens in _INPUTS[:4]]
    monkeypatch.setattr(module, "_STEP", 16)
    # float32, other orders of summation
    np.testing.assert_allclose(embed(model, _INPUTS[:4]), alone, atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(dtype=mx.float32)
    kinds = [type(each) for each in model.modules()]
    embed(model, [[1, 2]])
    assert [type(each) for each in model.modules()] == kinds
    assert embed(model, []) == ()


def test_an_empty_input_is_refused() -> None:
    with pytest.raises(RequestError, match="input 1 has no tokens") as caught:
        embed(tiny_model(), [[1], []])
    assert caught.value.param == "input"


def test_a_family_that_has_no_head_to_watch_is_refused() -> None:
    model, _ = tiny_family("seed_oss")
    with pytest.raises(UnsupportedModel, match="seed_oss"):
        embed(model, [[1, 2]])
