"""Merging is a sum, fusing is the same function, PEFT folders hold the same numbers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as stock_load_model
from safetensors.numpy import load_file, save_file
from support_lora import ALL_TARGETS, BASE, TOKENS, adapt, quantized_model, uneven
from support_models import LLAMA, QWEN3_MOE, byte_tokenizer, read_json, tiny_model

from mlx_optiq_ext.errors import AdapterError, FingerprintMismatch, OutputExists
from mlx_optiq_ext.formats.adapter import find_adapter
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.factors import Adapter
from mlx_optiq_ext.lora.files import (
    describe_adapter,
    load_adapter,
    locate_factors,
    read_adapter,
    save_adapter,
    write_adapter,
)
from mlx_optiq_ext.lora.fuse import fuse_modules, fused_weight
from mlx_optiq_ext.lora.fuse_folder import FuseJob, fuse_folder
from mlx_optiq_ext.lora.layers import adapted_modules, get_factors
from mlx_optiq_ext.lora.merge import merge_adapters
from mlx_optiq_ext.lora.peft import write_peft
from mlx_optiq_ext.lora.targets import choice_of, list_targets
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import BitMap, Choice, ModelFingerprint

FAMILIES = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE}
LABELS = ["keep", "2g64", "3g64", "4g64", "5g64", "6g64", "8g64", "mxfp4", "nvfp4", "mxfp8"]


def adapter_on(
    model: nn.Module,
    ranks: dict[str, int] | int,
    seed: int = 0,
    scale: float = 2.0,
    targets: str = ALL_TARGETS,
) -> Adapter:
    rank_map = adapt(model, ranks, seed=seed, scale=scale)
    config = describe_adapter(rank_map, AdapterOptions(targets=targets, scale=scale), base=BASE)
    return Adapter(config, {path: get_factors(layer) for path, layer in adapted_modules(model).items()})


def without_embeddings(model: nn.Module) -> dict[str, int]:
    return {
        target.path: 1 + k % 3 for k, target in enumerate(list_targets(model)) if target.kind != "embedding"
    }


def logits(model: Any) -> np.ndarray[Any, Any]:
    return np.array(model(TOKENS))


def delta(adapter: Adapter, path: str) -> np.ndarray[Any, Any]:
    factors = adapter.factors[path]
    product = factors.a.astype(mx.float32) @ factors.b.astype(mx.float32)
    return adapter.config.scale_of(path) * np.array(product)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_the_weighted_sum_of_the_deltas(family: str, tmp_path: Path) -> None:
    models = [quantized_model("4g64", FAMILIES[family]) for _ in range(3)]
    first = adapter_on(models[0], uneven(models[0]), seed=1, scale=2.0)
    second = adapter_on(models[1], 3, seed=2, scale=0.5)
    third = adapter_on(models[2], {"model.layers.0.self_attn.k_proj": 2}, seed=3)
    merged = merge_adapters([(first, 1.0), (second, -0.25), (third, 2.0)], ["a", "b", "c"])
    for path in merged.factors:
        parts = [(first, 1.0), (second, -0.25), (third, 2.0)]
        expected = sum(w * delta(adapter, path) for adapter, w in parts if path in adapter.factors)
        np.testing.assert_allclose(delta(merged, path), expected, rtol=0, atol=1e-6)
        assert merged.config.ranks[path] == sum(a.config.ranks.get(path, 0) for a, _ in parts)
    assert merged.config.base == BASE
    assert merged.config.training.settings == {"a": 1.0, "b": -0.25, "c": 2.0}
    write_adapter(tmp_path, merged)
    model = quantized_model("4g64", FAMILIES[family])
    load_adapter(model, tmp_path)
    for path, layer in adapted_modules(model).items():
        np.testing.assert_array_equal(get_factors(layer).b, merged.factors[path].b)


def test_a_merge_of_one_adapter_with_itself_is_twice_its_function_bit_for_bit() -> None:
    model = quantized_model("4g64")
    adapter = adapter_on(model, 2)
    merged = merge_adapters([(adapter, 1.0), (adapter, 1.0)])
    for path, factors in adapter.factors.items():
        np.testing.assert_array_equal(merged.factors[path].a[..., :2], factors.a)
        np.testing.assert_array_equal(merged.factors[path].b[2:], factors.b)


def test_adapters_of_different_bases_are_not_merged() -> None:
    model = quantized_model("4g64")
    adapter = adapter_on(model, 2)
    other = Adapter(
        type(adapter.config)(
            ranks=adapter.config.ranks,
            scale=2.0,
            base=ModelFingerprint(model_type="llama", sha256="1" * 64, source="other"),
        ),
        adapter.factors,
    )
    with pytest.raises(FingerprintMismatch, match="tiny and other"):
        merge_adapters([(adapter, 1.0), (other, 1.0)])
    with pytest.raises(AdapterError, match="no adapter to merge"):
        merge_adapters([])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", LABELS)
def test_fused_dense_weights_compute_what_the_adapter_computes(label: str, family: str) -> None:
    model, plain = (quantized_model(label, FAMILIES[family]) for _ in range(2))
    adapter = adapter_on(model, uneven(model))
    fused = fuse_modules(plain, adapter, store="dense")
    before = logits(plain)
    plain.update_modules(tree_unflatten(list(fused.items())))
    np.testing.assert_allclose(logits(plain), logits(model), rtol=0, atol=1e-4)
    assert np.abs(logits(plain) - before).max() > 0.1
    assert all(choice_of(module) is None for module in fused.values())


@pytest.mark.parametrize("label", LABELS[1:])
def test_fused_weights_keep_the_storage_of_the_base(label: str) -> None:
    model, plain = quantized_model(label), quantized_model(label)
    adapter = adapter_on(model, uneven(model))
    ones = {path: mx.ones(_columns(plain, path)) for path in adapter.factors}
    for importance in (None, ones):
        fused = fuse_modules(plain, adapter, store="same", importance=importance)
        for path, module in fused.items():
            old, none = (
                get_module(plain, path),
                adapter.factors[path]._replace(b=mx.zeros_like(adapter.factors[path].b)),
            )
            assert choice_of(module) == choice_of(old) == Choice.parse(label)
            assert {k: (v.shape, v.dtype) for k, v in module.items() if isinstance(v, mx.array)} == {
                k: (v.shape, v.dtype) for k, v in old.items() if isinstance(v, mx.array)
            }
            assert mx.any(fused_weight(module, none, 1.0) != fused_weight(old, none, 1.0)).item()


@pytest.mark.parametrize("label", ["3g64", "4g64", "6g64", "8g64"])
def test_fused_weights_in_the_base_s_bits_are_the_adapted_ones_within_a_step(label: str) -> None:
    model, plain = quantized_model(label), quantized_model(label)
    adapter = adapter_on(model, uneven(model))
    for path, module in fuse_modules(plain, adapter, store="same").items():
        factors = adapter.factors[path]
        wanted = fused_weight(get_module(plain, path), factors, adapter.config.scale_of(path))
        nothing = factors._replace(b=mx.zeros_like(factors.b))
        error = np.abs(np.array(fused_weight(module, nothing, 1.0) - wanted))
        # A code is off by half a step; the step itself is moved a little to have zero or the edge exactly.
        step = np.repeat(np.abs(np.array(module.scales.astype(mx.float32))), 64, axis=-1)
        assert (error <= step + 1e-6).all()
        assert error.mean() < 0.3 * step.mean()  # 0.25 where errors are even


def _columns(model: nn.Module, path: str) -> int:
    target = next(t for t in list_targets(model) if t.path == path)
    return target.outputs if target.kind == "embedding" else target.inputs


def base_folder(folder: Path, label: str, config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> ModelRef:
    model = quantized_model(label, config)
    folder.mkdir()
    writer = CheckpointWriter(folder)
    for name, array in tree_flatten(model.parameters()):
        writer.add(name, array.astype(dtype) if array.dtype == mx.float32 else array)
    choices = {t.path: t.choice for t in list_targets(model) if t.choice is not None}
    writer.finish(
        {**config, "torch_dtype": str(dtype).removeprefix("mlx.core.")},
        BitMap(choices=choices),
        tokenizer=byte_tokenizer(320),
    )
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "optiq_vision.safetensors").write_bytes(b"kept")
    return ModelRef(path=str(folder), source="base")


@pytest.mark.parametrize(("label", "family"), [("4g64", "llama"), ("4g64", "qwen3_moe"), ("mxfp4", "llama")])
def test_a_fused_folder_is_a_model_for_stock_mlx_lm(label: str, family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    ref = base_folder(tmp_path / "base", label, config)
    model = quantized_model(label, config)
    adapter = adapter_on(model, uneven(model))
    own = type(adapter.config)(**{**_fields(adapter.config), "base": fingerprint(ref)})
    save_adapter(tmp_path / "adapter", model, own)
    dense = fuse_folder(
        FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "dense", store="dense", num_tokens=512)
    )
    same = fuse_folder(FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "same", num_tokens=512))
    plain = fuse_folder(FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "plain", num_tokens=0))
    loaded, _ = stock_load_model(tmp_path / "dense")
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert dense.added is not None
    assert dense.change is not None
    assert dense.added < 1e-6 < dense.change
    again, written = stock_load_model(tmp_path / "same")
    assert {t.path: t.choice for t in list_targets(again)} == {
        t.path: t.choice for t in list_targets(quantized_model(label, config))
    }
    assert written["quantization"][sorted(own.ranks)[0]]["bits"] == 4
    assert same.added is not None
    assert 0 < same.added < 1
    assert same.num_windows == 4
    assert same.added_stderr > 0
    assert (same.nbytes, plain.added, plain.change) == (plain.nbytes, None, None)
    assert dense.nbytes > same.nbytes
    assert (tmp_path / "same" / "optiq_vision.safetensors").read_bytes() == b"kept"
    assert read_json(tmp_path / "same" / "generation_config.json") == {"temperature": 0.5}
    with pytest.raises(OutputExists):
        fuse_folder(FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "same"))


@pytest.mark.parametrize("store", ["same", "dense"])
def test_what_an_adapter_leaves_alone_is_written_as_it_was(store: Any, tmp_path: Path) -> None:
    ref = base_folder(tmp_path / "base", "4g64", LLAMA, mx.bfloat16)
    model = quantized_model("4g64")
    path = "model.layers.0.mlp.up_proj"
    write_adapter(tmp_path / "adapter", adapter_on(model, {path: 3}))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["optiq"]["base"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    job = FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "out", store=store, num_tokens=256)
    fuse_folder(job)
    old, new = (mx.load(str(tmp_path / folder / "model.safetensors")) for folder in ("base", "out"))
    for name, array in new.items():
        if name.startswith(f"{path}."):
            assert array.dtype == (mx.uint32 if name.endswith("weight") and store == "same" else mx.bfloat16)
        else:
            assert array.dtype == old[name].dtype
            assert mx.array_equal(array, old[name]).item()
    kept = {name for name in old if store == "same" or not name.startswith(path)}
    assert kept | {f"{path}.weight"} == set(new)


def test_an_adapter_of_other_weights_is_not_fused(tmp_path: Path) -> None:
    ref = base_folder(tmp_path / "base", "4g64", LLAMA)
    model = quantized_model("4g64")
    write_adapter(tmp_path / "adapter", adapter_on(model, 2))
    with pytest.raises(FingerprintMismatch, match="was made for other weights"):
        fuse_folder(FuseJob(base=ref, adapter=tmp_path / "adapter", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_through_peft_keeps_every_bit(family: str, tmp_path: Path) -> None:
    model = quantized_model("4g64", FAMILIES[family])
    adapter = adapter_on(model, without_embeddings(model))
    write_peft(tmp_path / "peft", adapter)
    again = read_adapter(tmp_path / "peft")
    assert find_adapter(tmp_path / "peft").form == "peft"
    assert again.config.ranks == adapter.config.ranks
    for path, factors in adapter.factors.items():
        np.testing.assert_array_equal(again.factors[path].a, factors.a)
        np.testing.assert_array_equal(again.factors[path].b, factors.b)
        assert again.config.scale_of(path) == adapter.config.scale_of(path)
    write_peft(tmp_path / "twice", again)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / folder / name for folder in ("peft", "twice"))
        if name.endswith("json"):
            kept = {key: value for key, value in read_json(first).items() if key != "base_model_name_or_path"}
            assert kept.items() <= read_json(second).items()
        else:
            assert first.read_bytes() == second.read_bytes()
    write_adapter(tmp_path / "native", again)
    other = quantized_model("4g64", FAMILIES[family])
    load_adapter(other, tmp_path / "native")
    np.testing.assert_array_equal(logits(other), logits(model))


def test_peft_files_have_pefts_names_and_orientation(tmp_path: Path) -> None:
    model = quantized_model("4g64", QWEN3_MOE)
    write_peft(tmp_path, adapter_on(model, without_embeddings(model)))
    tensors = load_file(str(tmp_path / "adapter_model.safetensors"))
    prefix = "base_model.model.model.layers.1"
    rank = without_embeddings(quantized_model("4g64", QWEN3_MOE))["model.layers.1.self_attn.k_proj"]
    assert tensors[f"{prefix}.self_attn.k_proj.lora_A.weight"].shape == (rank, 128)
    assert tensors[f"{prefix}.self_attn.k_proj.lora_B.weight"].shape == (64, rank)
    assert tensors[f"{prefix}.mlp.experts.3.down_proj.lora_A.weight"].shape[1] == 64
    config = read_json(tmp_path / "adapter_config.json")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == 2.0 * config["r"]
    pattern = {**dict.fromkeys(config["target_modules"], config["r"]), **config["rank_pattern"]}
    assert pattern["model.layers.1.self_attn.k_proj"] == rank
    assert config["alpha_pattern"].get("model.layers.1.self_attn.k_proj", config["lora_alpha"]) == 2.0 * rank


def peft_folder(folder: Path, **config: Any) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, rank in (("self_attn.q_proj", 4), ("self_attn.o_proj", 8)):
        name = f"base_model.model.model.layers.0.{path}"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, 128)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((128, rank)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    document = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "o_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"q_proj": 3.0, "o_proj": 1.5}),
        ({"alpha_pattern": {"o_proj": 16}}, {"q_proj": 3.0, "o_proj": 2.0}),
        ({"use_rslora": True}, {"q_proj": 6.0, "o_proj": 12 / 8**0.5}),
        ({"alpha_pattern": {r"layers\.0\..*": 4.0}}, {"q_proj": 1.0, "o_proj": 0.5}),
    ],
)
def test_scales_of_peft_follow_its_patterns(
    config: dict[str, Any], expected: dict[str, float], tmp_path: Path
) -> None:
    adapter = read_adapter(peft_folder(tmp_path, rank_pattern={"o_proj": 8}, **config))
    found = {path.rpartition(".")[2]: adapter.config.scale_of(path) for path in adapter.factors}
    assert found == pytest.approx(expected, rel=1e-15)


def test_scales_of_their_own_reach_the_model_and_stock_mlx_lm(tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder(tmp_path / "peft", rank_pattern={"o_proj": 8}))
    write_adapter(tmp_path / "ours", adapter)
    from_peft, ours, stock = (quantized_model("4g64") for _ in range(3))
    load_adapter(from_peft, tmp_path / "peft")
    load_adapter(ours, tmp_path / "ours")
    load_adapters(stock, str(tmp_path / "ours"))
    stock.eval()
    np.testing.assert_array_equal(logits(ours), logits(from_peft))
    np.testing.assert_allclose(logits(stock), logits(ours), rtol=0, atol=1e-4)
    layer = adapted_modules(ours)["model.layers.0.self_attn.q_proj"]
    a, b = (
        load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))[
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"
        ]
        for half in "AB"
    )
    x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    expected = np.array(layer.linear(mx.array(x))) + 12 / 4 * x @ a.T @ b.T
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"r": "many"}, "not a PEFT config"),
    ],
)
def test_other_kinds_of_peft_adapters_are_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=says):
        read_adapter(peft_folder(tmp_path, **config))


def test_embeddings_and_foreign_tensors_are_not_exchanged_with_peft(tmp_path: Path) -> None:
    model = quantized_model("4g64")
    with pytest.raises(AdapterError, match=r"model\.embed_tokens: low-rank factors of embeddings"):
        write_peft(tmp_path, adapter_on(model, 2))
    folder = peft_folder(tmp_path)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    save_file(
        {**tensors, "base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)},
        str(folder / "adapter_model.safetensors"),
    )
    with pytest.raises(AdapterError, match=r"lm_head\.weight; only lora_A and lora_B"):
        read_adapter(folder)


def test_experts_without_an_adapter_add_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.mlp.experts"
    save_file(
        {
            f"{name}.{e}.up_proj.lora_{half}.weight": rng.standard_normal(shape).astype(np.float32)
            for e, rank in ((1, 2), (3, 2))
            for half, shape in (("A", (rank, 128)), ("B", (64, rank)))
        },
        str(tmp_path / "adapter_model.safetensors"),
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    adapter = locate_factors(read_adapter(tmp_path), tiny_model(QWEN3_MOE))
    factors = adapter.factors["model.layers.0.mlp.switch_mlp.up_proj"]
    assert factors.a.shape == (4, 128, 2)
    assert [bool(mx.any(factors.a[e] != 0).item()) for e in range(4)] == [False, True, False, True]


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}
