"""Rotation of cached values in the weights: exact where it is done, refused where it would not be."""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace
from support_families import save_family, tiny_family
from support_measure import quick_options, save_tiny, write_calibration
from support_models import read_json

from mlx_optiq_ext.convert import opening
from mlx_optiq_ext.convert.kv_cache import plan_cache
from mlx_optiq_ext.convert.model import convert_model
from mlx_optiq_ext.convert.opening import open_source
from mlx_optiq_ext.errors import UnsupportedModel, VerificationError
from mlx_optiq_ext.eval.kv_compare import compare_caches
from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.formats.kv_config import write_kv_config
from mlx_optiq_ext.formats.metadata import read_metadata
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.fold import find_folds, fold_values, rotated_blocks
from mlx_optiq_ext.measure.calibration import load_windows
from mlx_optiq_ext.models.load import cast_floats
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.patches.kv_command import command
from mlx_optiq_ext.patches.kv_options import with_kv_options
from mlx_optiq_ext.patches.registry import activate
from mlx_optiq_ext.quant.journal import journal_key
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import (
    AllocateOptions,
    ConvertOptions,
    KVCacheOptions,
    KVScoreOptions,
    ScoreOptions,
)
from mlx_optiq_ext.types.quant import KEEP

TOKENS = mx.array([list(range(3, 40))])


def exact_family(name: str):
    model, config = tiny_family(name)
    cast_floats(model, mx.float32)
    return model, config


def converting(text: Path, **changed) -> ConvertOptions:
    measure = changed.pop("measure", quick_options(text))
    allocate = AllocateOptions(target_bpw=6.0)
    return ConvertOptions(
        measure=measure, allocate=allocate, rotate_values=True, score=False, verify=False, **changed
    )


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_oss", "mixtral", "gpt2", "gemma3_text"]
)
def test_folded_model_is_the_same_function(name: str) -> None:
    model, _ = exact_family(name)
    before = np.array(logits_of(model(TOKENS)))
    plan = find_folds(exact_family(name)[0])
    assert plan.blocks == (0, 1, 2)
    assert not plan.refused
    fold_values(model, plan.folds)
    after = np.array(logits_of(model(TOKENS)))
    # Float32 rounding of three blocks; the change of basis itself is orthonormal.
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_folded_values_are_those_that_a_cache_would_rotate() -> None:
    model, _ = exact_family("qwen2")
    assert "bias" in get_module(model, "model.layers.0.self_attn.v_proj")
    x = mx.random.normal((1, 5, 64), key=mx.random.key(1))

    def values() -> mx.array:
        made = get_module(model, "model.layers.0.self_attn.v_proj")(x)
        return made.reshape(1, 5, 2, -1).transpose(0, 2, 1, 3)

    plain = values()
    fold_values(model, find_folds(exact_family("qwen2")[0]).folds)
    dim = plain.shape[-1]
    codec = Codec(KEEP, dim, rotate=True)
    expected = codec.transform(plain) * (codec.divisor / dim**0.5)
    np.testing.assert_allclose(np.array(values()), np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_5", "rotated values change what its attention returns"),
        ("qwen3_next", "rotated values change what its attention returns"),
        ("gpt_neox", "rotated values change what its attention returns"),
        ("gemma4", "some blocks read the values of others"),
        ("gemma3n", "v_norm stands between"),
        ("deepseek_v3", "no attention with a value and an output projection of its own"),
    ],
)
def test_blocks_that_would_change_are_refused(name: str, reason: str) -> None:
    plan = find_folds(exact_family(name)[0])
    assert not plan.folds
    assert plan.refused
    assert all(reason in why for _, why in plan.refused)
    assert len(plan.reasons) == 1


def test_conversion_without_any_block_to_rotate_is_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "deepseek_v3")
    options = converting(write_calibration(tmp_path / "c.jsonl"))
    with pytest.raises(UnsupportedModel, match=r"finds no block to rotate .*leave it out"):
        open_source(ModelRef(path=str(folder), source="m"), options)


def test_wrong_fold_is_seen_before_anything_is_quantized(tmp_path, monkeypatch) -> None:
    ref = save_tiny(tmp_path / "m")

    def wrong(model, folds) -> None:
        for fold in folds:
            module = get_module(model, fold.output)
            module.weight = module.weight * 1.5

    monkeypatch.setattr(opening, "fold_values", wrong)
    with pytest.raises(VerificationError, match="nats per token from itself"):
        open_source(ref, converting(write_calibration(tmp_path / "c.jsonl")))


def test_measurement_of_rotated_values_has_a_key_of_its_own(tmp_path: Path) -> None:
    ref, text = save_tiny(tmp_path / "m"), write_calibration(tmp_path / "c.jsonl")
    rotated = open_source(ref, converting(text))
    plain = open_source(ref, replace(converting(text), rotate_values=False))
    assert rotated.edited
    windows = load_windows(
        rotated.tokenizer(), source=str(text), split="calibration", num_tokens=256, window=32
    )
    keys = {
        journal_key(fingerprint(ref), windows, quick_options(text), "float32", reference.edited)
        for reference in (rotated, plain)
    }
    assert len(keys) == 2
    assert not plain.edited
    assert any("rotated in the weights" in note for note in rotated.edit_notes)


def test_checkpoint_says_what_is_rotated_and_its_cache_is_not_rotated_again(tmp_path: Path) -> None:
    activate("mlx_lm.models.base")
    activate("mlx_lm.models.cache")
    ref, text = save_tiny(tmp_path / "m"), write_calibration(tmp_path / "c.jsonl")
    out = tmp_path / "out"
    result = convert_model(ref, replace(converting(text), verify=True), out)
    blocks = rotated_blocks(read_json(out / "config.json"))
    assert blocks
    assert result.values_rotated == blocks
    assert result.verification is not None
    assert result.verification.forward == "finite logits"
    metadata = read_metadata(out)
    assert isinstance(metadata, CheckpointMetadata)
    assert metadata.values_rotated == blocks
    assert "--rotate-values" in metadata.command
    cache = KVCacheOptions(
        context=64, num_tokens=128, target_bits=6.0, calibration=str(text), held_out=str(text)
    )
    plan = plan_cache(ModelRef(path=str(out), source="out"), cache)
    assert plan.table.values_rotated == blocks
    assert all(layer.values_rotated for layer in plan.config.layers)
    unrotated = [replace(layer, values_rotated=False) for layer in plan.config.layers]
    of_source = replace(plan.config, layers=tuple(unrotated))
    for config, folder in ((of_source, out), (plan.config, Path(ref.path))):
        given = tmp_path / f"{folder.name}.json"
        write_kv_config(given, config)
        parser = with_kv_options(argparse.ArgumentParser(), opens_caches=False)
        parser.add_argument("--model")
        with command("tried") as asked:
            parser.parse_args(["--model", str(folder), "--kv-config", str(given)])
        # What the weights do not do, the cache does, and only that.
        assert asked.config == (plan.config if folder == out else of_source)
    options = KVScoreOptions(kv_config=str(tmp_path / "out.json"), lengths="64")
    text_of = ScoreOptions(num_tokens=128, held_out=str(text))
    rows = {
        name: compare_caches(ref, [ModelRef(path=str(out), source="out")], text_of, asked_for).rows
        for name, asked_for in (
            ("source", options),
            ("folded", replace(options, kv_config=str(tmp_path / f"{Path(ref.path).name}.json"))),
        )
    }
    assert [row.divergence for row in rows["source"]] == [row.divergence for row in rows["folded"]]
    assert any(row.cache == "configured" and row.divergence > 0 for row in rows["source"])


def test_rotated_source_is_not_rotated_twice(tmp_path: Path) -> None:
    ref, text = save_tiny(tmp_path / "m"), write_calibration(tmp_path / "c.jsonl")
    first = open_source(ref, converting(text))
    config = read_json(Path(ref.path) / "config.json")
    again = tmp_path / "again"
    again.mkdir()
    for file in Path(ref.path).iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    write_json_atomic(again / "config.json", {**config, "optiq_kv": first.config["optiq_kv"]})
    second = open_source(ModelRef(path=str(again), source="again"), converting(text))
    assert rotated_blocks(second.config) == rotated_blocks(first.config)
    path = "model.layers.0.self_attn.v_proj"
    stored = open_source(ref, replace(converting(text), rotate_values=False))
    np.testing.assert_array_equal(
        np.array(get_module(second.model, path).weight), np.array(get_module(stored.model, path).weight)
    )


def test_streamed_conversion_writes_what_a_resident_one_does(tmp_path: Path) -> None:
    ref, text = save_tiny(tmp_path / "m"), write_calibration(tmp_path / "c.jsonl")
    tensors = {}
    for how in ("resident", "stream"):
        out = tmp_path / how
        convert_model(ref, converting(text, measure=quick_options(text, reference=how)), out)
        tensors[how] = mx.load(str(out / "model.safetensors"))
    assert tensors["resident"].keys() == tensors["stream"].keys()
    for name, array in tensors["resident"].items():
        np.testing.assert_array_equal(
            np.array(array.astype(mx.float32)), np.array(tensors["stream"][name].astype(mx.float32)), name
        )
