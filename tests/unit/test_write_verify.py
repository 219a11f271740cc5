import json
import shutil
import signal
import subprocess
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_model
from support_models import LLAMA, QWEN3_MOE, quantize_by, read_json, save_model_folder, tiny_model

from mlx_optiq_ext.errors import ResourceError, UsageError, VerificationError
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.quant.verify import compare_bytes, compare_config, inspect_checkpoint, verify_checkpoint
from mlx_optiq_ext.quant.write import CheckpointWriter, quantization_config
from mlx_optiq_ext.types.quant import KEEP, BitMap, Choice

CHOICES = [
    *(
        Choice(bits=bits, group_size=group)
        for bits, group in ((4, 64), (3, 32), (8, 64), (2, 64), (5, 64), (6, 32))
    ),
    Choice.parse("mxfp4"),
    Choice.parse("nvfp4"),
    Choice.parse("mxfp8"),
    KEEP,
]


def mixed_plan(config: dict = LLAMA) -> BitMap:
    """Every kind of choice at least once."""
    paths = [path for path, module in tiny_model(config).named_modules() if hasattr(module, "to_quantized")]
    return BitMap(choices={path: CHOICES[i % len(CHOICES)] for i, path in enumerate(sorted(paths))})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    quantize_by(model, mixed_plan())
    folder = tmp_path_factory.mktemp("written") / "model"
    return save_model_folder(folder, model, LLAMA, mixed_plan(), max_shard_bytes=100_000)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_config(folder: Path, path: str, entry: object) -> None:
    config = read_json(folder / "config.json")
    for key in ("quantization", "quantization_config"):
        config[key][path] = entry
    (folder / "config.json").write_text(json.dumps(config))


def test_written_arrays_come_back_bit_identical_from_stock_load(checkpoint: Path) -> None:
    model = tiny_model()
    quantize_by(model, mixed_plan())
    loaded, _ = load_model(checkpoint)
    written, read = dict(tree_flatten(model.parameters())), dict(tree_flatten(loaded.parameters()))
    assert written.keys() == read.keys()
    for name, array in written.items():
        assert array.dtype == read[name].dtype, name
        assert mx.array_equal(array, read[name]), name


def test_shards_index_and_names_follow_mlx_lm(checkpoint: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    model, _ = load_model(checkpoint)
    save_model(tmp_path / "stock", model)
    ours, stock = (
        read_json(folder / "model.safetensors.index.json") for folder in (checkpoint, tmp_path / "stock")
    )
    assert ours["metadata"] == stock["metadata"]
    assert list(ours["weight_map"]) == list(stock["weight_map"])
    for file in files:
        assert mx.load(str(checkpoint / file), return_metadata=True)[1] == {"format": "mlx"}
        nbytes = sum(array.nbytes for array in mx.load(str(checkpoint / file)).values())
        assert nbytes <= 100_000 or len(mx.load(str(checkpoint / file))) == 1


def test_config_names_all_three_keys_and_only_quantized_paths(checkpoint: Path) -> None:
    config = read_json(checkpoint / "config.json")
    settings = config["quantization"]
    assert config["quantization_config"] == settings
    assert all(settings[key] for key in ("group_size", "bits", "mode"))
    planned = {path for path, choice in mixed_plan().choices.items() if choice != KEEP}
    assert {path for path, entry in settings.items() if isinstance(entry, dict)} == planned
    assert all(
        entry.keys() == {"group_size", "bits", "mode"} for path, entry in settings.items() if path in planned
    )
    assert "null" not in (checkpoint / "config.json").read_text()


def test_top_level_default_is_the_most_frequent_choice() -> None:
    four, eight = Choice(bits=4, group_size=64), Choice(bits=8, group_size=32)
    settings = quantization_config(
        BitMap(choices={"a": eight, "b": four, "c": four, "d": KEEP, "e": KEEP, "f": KEEP})
    )
    assert settings is not None
    assert [settings[key] for key in ("bits", "group_size", "mode")] == [4, 64, "affine"]
    assert quantization_config(BitMap(choices={"a": KEEP})) is None


def test_older_quantization_of_the_source_config_is_dropped(tmp_path: Path) -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8"}}
    folder = save_model_folder(tmp_path / "model", tiny_model(), config)
    assert "quantization_config" not in read_json(folder / "config.json")


def test_source_files_are_copied_and_the_tokenizer_loads(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    folder.mkdir()
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "generation_config.json").chmod(0o444)
    (source / "modeling.py").write_text("# a model file\n")
    (source / "pytorch_model.bin").write_text("not this")
    writer = CheckpointWriter(folder)
    writer.add("x.weight", mx.zeros((2, 2)))
    writer.finish({"model_type": "llama"}, BitMap(choices={}), source=source)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling.py",
    ]


def test_strided_scalar_and_bool_tensors_are_written_row_major(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    arrays = {
        "t": mx.arange(12, dtype=mx.float32).reshape(3, 4).T,
        "s": mx.array(2.5, dtype=mx.bfloat16),
        "b": mx.array([True, False]),
        "slice": mx.arange(10)[::3],
    }
    for name, array in arrays.items():
        writer.add(name, array)
    writer.finish({}, BitMap(choices={}))
    loaded = mx.load(str(tmp_path / "model.safetensors"))
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(np.array(loaded[name].astype(mx.float32)), np.array(array.astype(mx.float32)))


def test_doubled_name_and_empty_checkpoint_are_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    with pytest.raises(UsageError, match="no tensor"):
        writer.finish({}, BitMap(choices={}))
    writer.add("x", mx.zeros(1))
    with pytest.raises(UsageError, match="x was written before"):
        writer.add("x", mx.zeros(1))


def test_good_checkpoint_passes_in_a_fresh_stock_process(checkpoint: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in read_folder(checkpoint).values())
    report = verify_checkpoint(checkpoint, mixed_plan(), expected_nbytes=nbytes)
    assert report.problems == ()
    assert report.forward == "finite logits"
    assert report.num_paths == len(mixed_plan().choices)
    assert report.nbytes == nbytes
    assert report.mlx_lm == mlx_lm.__version__


def test_mixture_of_experts_passes(tmp_path: Path) -> None:
    plan = mixed_plan(QWEN3_MOE)
    model = tiny_model(QWEN3_MOE)
    quantize_by(model, plan)
    folder = save_model_folder(tmp_path / "moe", model, QWEN3_MOE, plan)
    assert verify_checkpoint(folder, plan).problems == ()
    assert any("switch_mlp" in path for path in plan.choices)


def test_plan_that_differs_from_the_bytes_names_the_path(checkpoint: Path) -> None:
    tensors = read_folder(checkpoint)
    for path, choice in mixed_plan().choices.items():
        for other in CHOICES:
            if other == choice:
                continue
            problems = compare_bytes(tensors, BitMap(choices={**mixed_plan().choices, path: other}))
            # An 8-bit tensor of 4-bit shapes is told apart by the loaded module, see the next test.
            assert all(problem.startswith(path) for problem in problems)
            ambiguous = (
                other.mode == choice.mode and other.bits * other.group_size == choice.bits * choice.group_size
            )
            assert problems or ambiguous, (path, choice.label, other.label)
    left_out = {path: choice for path, choice in mixed_plan().choices.items() if path != "model.embed_tokens"}
    assert compare_bytes(tensors, BitMap(choices=left_out)) == [
        "model.embed_tokens: packed on disk, not in the plan"
    ]


def test_config_that_differs_from_the_plan_is_found(copy: Path) -> None:
    path = "model.layers.1.mlp.up_proj"
    assert compare_config(read_json(copy / "config.json"), mixed_plan()) == []
    edit_config(copy, path, None)
    assert any(path in problem for problem in compare_config(read_json(copy / "config.json"), mixed_plan()))
    edit_config(copy, path, {"bits": 4, "group_size": 64})
    assert any(path in problem for problem in compare_config(read_json(copy / "config.json"), mixed_plan()))
    edit_config(copy, "model.norm", {"bits": 4, "group_size": 64, "mode": "affine"})
    found = compare_config(read_json(copy / "config.json"), mixed_plan())
    assert "model.norm: entry in config.json, not quantized in the plan" in found
    config = read_json(copy / "config.json")
    config["quantization_config"] = {}
    assert "config.json: quantization_config differs from quantization" in compare_config(
        config, mixed_plan()
    )


def test_checkpoint_stock_mlx_lm_cannot_load_is_refused(copy: Path) -> None:
    edit_config(copy, "model.embed_tokens", {"bits": 8, "group_size": 128, "mode": "affine"})
    with pytest.raises(VerificationError, match="stock mlx-lm does not load"):
        verify_checkpoint(copy, mixed_plan())


def test_not_finite_scales_wrong_size_and_stale_index_are_found(tmp_path: Path) -> None:
    plan = BitMap(choices={"model.layers.0.mlp.up_proj": Choice(bits=4, group_size=64)})
    model = tiny_model()
    quantize_by(model, plan)
    module = model.model.layers[0].mlp.up_proj
    module.scales = module.scales * float("nan")
    folder = save_model_folder(tmp_path / "model", model, LLAMA, plan)
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = inspect_checkpoint(folder, plan, expected_nbytes=1)
    assert "model.layers.0.mlp.up_proj.scales: not finite" in report.problems
    assert "forward pass failed: logits are not finite" in report.problems
    assert f"tensors have {report.nbytes} bytes, the allocation says 1" in report.problems
    assert "model.norm.weight: model.safetensors.index.json and files disagree" in report.problems
    with pytest.raises(VerificationError, match=r"up_proj\.scales: not finite"):
        verify_checkpoint(folder, plan)


def test_cut_weight_file_is_refused_before_a_process_starts(copy: Path) -> None:
    file = next(copy.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(VerificationError, match="cut off or damaged"):
        verify_checkpoint(copy, mixed_plan())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_verification_is_a_lack_of_resources(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def killed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -number, "", "")

    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(ResourceError, match=f"killed \\({number.name}\\)"):
        inspect_checkpoint(checkpoint, mixed_plan())


def test_a_verification_that_hangs_ends_with_its_time_limit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(ResourceError, match="within 60 minutes"):
        inspect_checkpoint(checkpoint, mixed_plan())


def test_a_tokenizer_that_cannot_be_written_is_a_lack_of_resources(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: str) -> None:
            raise OSError(28, "No space left on device", f"{folder}/tokenizer.json")

    writer = CheckpointWriter(tmp_path)
    writer.add("norm.weight", mx.ones(4))
    with pytest.raises(ResourceError, match=r"cannot write .*tokenizer\.json: No space left"):
        writer.finish({"model_type": "llama"}, BitMap(choices={}), tokenizer=Full())
