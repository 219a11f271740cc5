"""Estimated divergences against real caches in which one tensor alone is quantized."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from support_families import FAMILIES, tiny_family

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.eval.kv_score import NamedConfig, score_caches
from mlx_optiq_ext.kv.observe import observe
from mlx_optiq_ext.kv.sensitivity import EstimateSettings, KVTokens, choices_for, estimate_divergences
from mlx_optiq_ext.measure.intervals import spearman
from mlx_optiq_ext.patches.registry import activate
from mlx_optiq_ext.types.kv import KVConfig, KVLayer, KVProbe
from mlx_optiq_ext.types.quant import KEEP, Choice

activate("mlx_lm.models.base")
NAMES = ("llama", "gemma3_text", "deepseek_v3", "qwen3_5", "gemma4_text", "gpt_oss")


def exact_model(name: str) -> nn.Module:
    """A tiny instance in float32."""
    model, _ = tiny_family(name)
    model.update(
        tree_map(lambda x: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x, model.parameters())
    )
    mx.eval(model.parameters())
    return model


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the choice of experts out, which changes in steps that no derivative sees."""
    changes = {"deepseek_v3": {"first_k_dense_replace": 3}, "gpt_oss": {"num_experts_per_tok": 4}}
    for name, change in changes.items():
        monkeypatch.setitem(FAMILIES, name, FAMILIES[name] | change)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("smooth")
def test_estimates_are_near_what_real_caches_show(name: str) -> None:
    model = exact_model(name)
    caches = observe(model)
    tokens = np.random.default_rng(1).integers(0, 320, (6, 64)).astype(np.int32)
    wanted = {Choice(bits=b, group_size=32) for b in (3, 4, 5)} | {KEEP}
    candidates = {
        (site.name, tensor): tuple(c for c in choices_for(dim) if c in wanted)
        for site in caches.sites
        for tensor, dim in (("k", site.key_dim), ("v", site.value_dim))
    }
    model.train()
    settings = EstimateSettings(samples=4)
    found = estimate_divergences(model, caches, [KVTokens(64, tokens)], candidates, settings)  # type: ignore[arg-type]
    model.eval()
    probes = [p for p in found.probes if p.choice != KEEP]
    means = dict(zip(((s.index, s.member) for s in caches.sites), found.key_means, strict=True))
    configs = [NamedConfig(str(k), _only(p, means[p.index, p.member])) for k, p in enumerate(probes)]
    real = [n.divergence.mean() for n in score_caches(model, tokens, configs)[1:]]
    estimated = [p.divergence for p in probes]
    assert len(probes) >= 6
    assert spearman(estimated, real) > 0.9
    # Second order, sampled labels, and real caches are compared at the second half of a window only.
    ratios = np.array(estimated) / real
    assert 0.5 < np.median(ratios) < 2.0


def _only(probe: KVProbe, mean: str) -> KVConfig:
    """A cache in which one tensor is stored as probed."""
    k, v = (probe.choice, KEEP) if probe.tensor == "k" else (KEEP, probe.choice)
    layer = KVLayer(
        index=probe.index, member=probe.member, k=k, v=v, key_mean=mean if probe.tensor == "k" else ""
    )
    return KVConfig(layers=(layer,), rotate=True)


def test_blocks_that_read_each_others_caches_are_refused_with_the_reason() -> None:
    model = exact_model("gemma3n")
    tokens = np.zeros((1, 32), dtype=np.int32)
    with pytest.raises(UnsupportedModel, match="gemma3n: blocks reach into each other's caches"):
        estimate_divergences(model, observe(model), [KVTokens(32, tokens)], {}, EstimateSettings())
