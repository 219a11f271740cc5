"""Block-by-block differentiation follows the wiring of every family of mlx-lm."""

from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest
from support_families import FAMILIES, tiny_family
from support_gradients import gradients_by_block, gradients_of_whole_model

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.models import check
from mlx_optiq_ext.models.check import require_runnable, unpackable_paths
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.models.walk import list_units
from mlx_optiq_ext.types.quant import KEEP, Choice

REFUSED = {
    "bitnet": "does not run on this machine",
    "muse_spark": "does not run on this machine",
    "iquestloopcoder": "reaches into its blocks",
    "deepseek_v41": "cannot be differentiated",
}
UNKNOWN: set[str] = set()
if version("mlx-lm") == "0.32.0":
    REFUSED["phi3small"] = "writes outside of its arrays"
    UNKNOWN = {"muse_spark"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_gradients_by_block_are_those_of_the_whole_model(name: str) -> None:
    model, _ = tiny_family(name)
    model.set_dtype(mx.float32)
    require_runnable(model.train(), gradients=True)
    tokens = mx.random.randint(0, 256, (2, 40), key=mx.random.key(1))
    cotangent = mx.random.normal(logits_of(model(tokens)).shape, key=mx.random.key(2))
    expected = gradients_of_whole_model(model, tokens, cotangent)
    found = gradients_by_block(model, tokens, cotangent)
    kept = unpackable_paths(model)
    heads = expected.keys() - found.keys() - kept
    assert len(heads) <= 1, heads
    for path in found.keys() - kept:
        size = np.linalg.norm(expected[path])
        # float32 sums in another order; a wrong wiring is off by a tenth or more
        assert np.linalg.norm(found[path] - expected[path]) <= 1e-4 * size, path


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal runs more of them")
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - UNKNOWN))
def test_what_cannot_be_measured_is_refused_before_any_work(name: str) -> None:
    model, _ = tiny_family(name)
    with pytest.raises(UnsupportedModel, match=REFUSED[name]):
        require_runnable(model.train(), gradients=True)


def test_a_family_that_crashes_is_refused_with_that_mlx_lm_only(monkeypatch) -> None:
    model, _ = tiny_family("phi3small")
    monkeypatch.setattr(check, "version", lambda name: "0.32.0")
    with pytest.raises(UnsupportedModel, match=r"pip install 'mlx-lm>=0\.32\.1,<0\.33'"):
        require_runnable(model.train(), gradients=True)
    monkeypatch.setattr(check, "version", lambda name: "0.32.1")
    require_runnable(model.train(), gradients=True)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("seed_oss", {"model.embed_tokens"}),
        ("afm7", {"model.layers.0.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"}),
    ],
)
def test_what_does_not_run_packed_is_kept(name: str, kept: set[str]) -> None:
    model, config = tiny_family(name)
    before = list(model.named_modules())
    assert unpackable_paths(model) == kept
    assert [(path, id(module)) for path, module in model.named_modules()] == [(p, id(m)) for p, m in before]
    units = list_units(model, config, [Choice(bits=4, group_size=32)], unpackable=kept)
    assert {unit.path for unit in units if unit.choices == (KEEP,)} == kept


@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl"])
def test_projections_that_only_choose_positions_keep_eight_bits(name: str) -> None:
    model, config = tiny_family(name)
    units = list_units(model, config, [Choice(bits=4, group_size=32)])
    choosing = [unit for unit in units if "index" in unit.path]
    assert choosing
    assert all(choice.bits >= 8 for unit in choosing for choice in unit.choices)


def test_per_layer_tables_are_read_one_row_a_token() -> None:
    model, config = tiny_family("gemma4")
    share = {unit.module: unit.active_share for unit in list_units(model, config, [KEEP])}
    assert share["model.embed_tokens"] == 1.0
    assert share["model.embed_tokens_per_layer"] == pytest.approx(1 / 320)
