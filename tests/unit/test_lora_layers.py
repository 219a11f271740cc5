"""Adapter layers on every bit width and mode, and what is stored of them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from support_lora import ALL_TARGETS, BASE, TOKENS, adapt, quantized_model, uneven
from support_models import LLAMA, QWEN3_MOE

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.formats.adapter import NATIVE_WEIGHTS_FILE, find_adapter
from mlx_optiq_ext.lora.files import describe_adapter, load_adapter, read_adapter, save_adapter
from mlx_optiq_ext.lora.layers import adapted_modules, apply_lora, get_factors, remove_lora, set_factors
from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.targets import list_targets, select_targets
from mlx_optiq_ext.types.adapter import AdapterConfig, AdapterOptions

LABELS = ["keep", "2g64", "3g64", "4g64", "5g64", "6g64", "8g64", "mxfp4", "nvfp4", "mxfp8"]
FAMILIES = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE}


def logits(model: nn.Module) -> np.ndarray[Any, Any]:
    return np.array(model(TOKENS))


def store(folder: Path, model: nn.Module, rank_map: Any, scale: float = 2.0) -> AdapterConfig:
    options = AdapterOptions(targets=ALL_TARGETS, scale=scale)
    config = describe_adapter(rank_map, options, base=BASE)
    save_adapter(folder, model, config)
    return config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", LABELS)
def test_an_adapter_adds_its_product_to_every_kind_of_weight(label: str, family: str) -> None:
    config = FAMILIES[family]
    model = quantized_model(label, config)
    plain = logits(model)
    adapt(model, uneven(model))
    changed = logits(model)
    assert np.abs(changed - plain).max() > 0.1
    for layer in adapted_modules(model).values():
        factors = get_factors(layer)
        set_factors(layer, factors._replace(b=mx.zeros_like(factors.b)))
    np.testing.assert_array_equal(logits(model), plain)
    remove_lora(model)
    np.testing.assert_array_equal(logits(model), plain)
    assert not adapted_modules(model)


@pytest.mark.parametrize("label", LABELS)
def test_every_width_gives_gradients_of_the_factors_alone(label: str) -> None:
    model = quantized_model(label)
    apply_lora(model, plan_ranks(model, AdapterOptions(rank=2, rank_scaling="constant")), scale=2.0)

    def loss(model: nn.Module) -> mx.array:
        return mx.square(model(TOKENS)).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    flat = dict(tree_flatten(gradients))
    assert {name.rpartition(".")[2] for name in flat} == {"lora_a", "lora_b"}
    assert all(mx.all(mx.isfinite(g)).item() for g in flat.values())
    assert all(mx.abs(g).max().item() > 0 for name, g in flat.items() if name.endswith("lora_b"))


def test_the_start_of_a_path_depends_on_the_seed_and_on_nothing_else() -> None:
    whole, part = quantized_model("4g64"), quantized_model("4g64")
    adapt(whole, 4, seed=3)
    apply_lora(part, plan_ranks(part, AdapterOptions(rank=4, adapt=("1.*.q_proj",))), scale=2.0, seed=3)
    (path, layer), *others = adapted_modules(part).items()
    assert not others
    assert path == "model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(layer.lora_a, adapted_modules(whole)[path].lora_a)
    other = quantized_model("4g64")
    adapt(other, 4, seed=4)
    assert mx.any(layer.lora_a != adapted_modules(other)[path].lora_a).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_mlx_lm_and_we_compute_the_same_from_one_folder(family: str, tmp_path: Path) -> None:
    model = quantized_model("4g64", FAMILIES[family])
    ranks = uneven(model)
    config = store(tmp_path / "a", model, adapt(model, ranks))
    expected = logits(model)
    ours, stock = (quantized_model("4g64", FAMILIES[family]) for _ in range(2))
    assert load_adapter(ours, tmp_path / "a") == config
    np.testing.assert_array_equal(logits(ours), expected)
    assert (tmp_path / "a" / NATIVE_WEIGHTS_FILE).is_file()
    load_adapters(stock, str(tmp_path / "a"))
    stock.eval()
    adapted = adapted_modules(stock)
    assert set(adapted) == set(config.ranks)
    assert {get_factors(layer).rank for layer in adapted.values()} == {4}
    # Zero columns add exact zeros; the sums of a longer product may be grouped otherwise.
    np.testing.assert_allclose(logits(stock), expected, rtol=0, atol=2e-5)


def test_equal_ranks_need_one_file_only(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    store(tmp_path / "a", model, adapt(model, uneven(model)))
    even = quantized_model("4g64")
    store(tmp_path / "a", even, adapt(even, 3))
    assert not (tmp_path / "a" / NATIVE_WEIGHTS_FILE).exists()
    again = quantized_model("4g64")
    load_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), logits(even))


def test_an_adapter_of_stock_mlx_lm_is_read_with_the_ranks_of_its_tensors(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    config = store(tmp_path, model, adapt(model, 3))
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    del document["optiq"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    file = find_adapter(tmp_path)
    assert file.form == "mlx-lm"
    assert file.config.ranks == config.ranks
    assert file.config.scale == 2.0
    assert file.config.embeddings == ("model.embed_tokens",)


def test_the_published_form_is_read_from_either_of_its_files(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    ranks = uneven(model)
    config = store(tmp_path, model, adapt(model, ranks))
    (tmp_path / NATIVE_WEIGHTS_FILE).replace(tmp_path / "adapters.safetensors")
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    document["optiq"] = {"rank_scaling": "by_bits", "applied_ranks": config.ranks}
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    file = find_adapter(tmp_path)
    assert (file.form, file.config.rank_scaling, file.config.ranks) == ("published", "by_bits", config.ranks)
    del document["optiq"], document["model"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    options = {"rank_scaling": "by_bits", "applied_ranks": config.ranks, "source_model": "org/base", "lr": 1}
    (tmp_path / "optiq_lora_config.json").write_text(json.dumps(options))
    file = find_adapter(tmp_path)
    assert (file.form, file.config.ranks) == ("published", config.ranks)
    assert file.config.base is not None
    assert file.config.base.source == "org/base"
    again = quantized_model("4g64")
    load_adapter(again, tmp_path)
    np.testing.assert_array_equal(logits(again), logits(model))


def test_a_model_whose_tree_has_another_prefix_takes_the_adapter(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    options = AdapterOptions(rank=2)
    rank_map = plan_ranks(model, options)
    apply_lora(model, rank_map, scale=2.0)
    save_adapter(tmp_path, model, describe_adapter(rank_map, options, base=None))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = quantized_model("4g64")

    config = load_adapter(Wrapped(), tmp_path)
    assert set(config.ranks) == {f"language_model.{path}" for path in rank_map.ranks}


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    config = store(tmp_path / "a", model, adapt(model, uneven(model)))
    with pytest.raises(AdapterError, match=r"model\.layers.* made for another"):
        load_adapter(quantized_model("4g64", {**LLAMA, "num_hidden_layers": 1}), tmp_path / "a")
    with pytest.raises(AdapterError, match="do not fit a layer"):
        load_adapter(quantized_model("4g64", {**LLAMA, "intermediate_size": 512}), tmp_path / "a")
    with pytest.raises(AdapterError, match="has an adapter already"):
        select_targets(model, AdapterOptions())
    path = next(iter(config.ranks))
    with pytest.raises(AdapterError, match=rf"{path} has rank"):
        save_adapter(tmp_path / "b", model, AdapterConfig(ranks={**config.ranks, path: 9}, scale=2.0))
    layer = adapted_modules(model)[path]
    layer.lora_b = layer.lora_b * float("nan")
    with pytest.raises(AdapterError, match=rf"{path} are not finite; nothing is written"):
        save_adapter(tmp_path / "b", model, config)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fine_tune_type": "dora", "optiq": None}, "of the type 'dora'"),
        ({"fine_tune_type": "full", "optiq": None}, "of the type 'full'"),
        ({"lora_parameters": None, "optiq": None}, r"no lora_parameters\.scale"),
        ({"optiq": {"format_version": 9}}, "format version 9"),
        ({"optiq": {"format_version": 1, "ranks": {}, "scale": 1.0}}, "do not belong together"),
        ({"optiq": {"format_version": 1, "ranks": {}, "scale": 1.0, "weights": "../x"}}, "names the weights"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = quantized_model("4g64")
    store(tmp_path, model, adapt(model, 2))
    document = {**json.loads((tmp_path / "adapter_config.json").read_text()), **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(AdapterError, match=says):
        read_adapter(tmp_path)


def test_a_folder_without_adapter_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    model = quantized_model("4g64")
    store(tmp_path, model, adapt(model, 2))
    weights = tmp_path / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="cut off"):
        read_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(AdapterError, match="missing"):
        read_adapter(tmp_path)


def test_targets_are_grouped_by_what_they_do() -> None:
    groups = {t.path: t.group for t in list_targets(quantized_model("4g64", QWEN3_MOE))}
    block = "model.layers.0"
    assert groups[f"{block}.self_attn.q_proj"] == "attention"
    assert groups[f"{block}.mlp.switch_mlp.up_proj"] == "experts"
    assert groups[f"{block}.mlp.gate"] == "router"
    assert groups["model.embed_tokens"] == "embeddings"
    dense = {t.path: t.group for t in list_targets(quantized_model("4g64"))}
    assert dense[f"{block}.mlp.up_proj"] == "mlp"
