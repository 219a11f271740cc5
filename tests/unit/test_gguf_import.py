"""A GGUF file becomes a folder that stock mlx-lm loads as the same function; what cannot be is refused."""

import json
import zipfile

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from support_gguf import byte_level_vocabulary, random_model, write_gguf

from mlx_optiq_ext.cli.commands.import_gguf import import_folder
from mlx_optiq_ext.errors import ModelError, OutputExists, ResourceError, UnsupportedModel, UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint, weights_origin
from mlx_optiq_ext.models import gguf_import
from mlx_optiq_ext.models.gguf_import import locate_gguf, plan_import
from mlx_optiq_ext.types.metadata import IMPORT_FILE
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ImportGgufOptions

FLOAT32 = ImportGgufOptions(dtype="float32")
TOKENS = mx.array([[5, 99, 3, 200, 41, 7, 7, 160]])
CASES = {
    "llama-tied": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen3": ("qwen3", {}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
}


@pytest.fixture
def tiny(tmp_path):
    """A tiny Llama as a GGUF file."""
    return write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_imported_model_is_the_same_function(tmp_path, family, changes):
    original = random_model(family, **changes)
    source = write_gguf(tmp_path / "model.gguf", original, family)
    import_folder(source, tmp_path / "out", FLOAT32)
    imported, _ = load(str(tmp_path / "out"))
    # float32 weights pass through unchanged; gemma's norms lose a rounding in w + 1 - 1.
    tolerance = 1e-3 if family == "gemma" else 0.0
    assert mx.allclose(imported(TOKENS), original(TOKENS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_have_the_wanted_type(tmp_path, tiny, dtype):
    imported = import_folder(tiny, tmp_path / "out", ImportGgufOptions(dtype=dtype))
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {getattr(mx, dtype)}
    assert imported.nbytes == sum(array.nbytes for array in weights.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_large_files_are_written_in_shards(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(gguf_import, "_SHARD_NBYTES", 100_000)
    original = random_model("llama")
    import_folder(tiny, tmp_path / "out", FLOAT32)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 110_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    imported, _ = load(str(tmp_path / "out"))
    assert mx.array_equal(imported(TOKENS), original(TOKENS))


def test_chunked_decoding_changes_nothing(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(gguf_import, "_CHUNK_NUMEL", 64)
    import_folder(tiny, tmp_path / "out", FLOAT32)
    imported, _ = load(str(tmp_path / "out"))
    assert mx.array_equal(imported(TOKENS), random_model("llama")(TOKENS))


def test_llama3_rotary_table_becomes_its_rule(tmp_path):
    rule = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = random_model("llama", rope_scaling=rule, rope_theta=500000.0)
    frequencies = np.array(original.layers[0].self_attn.rope._freqs)
    divisors = frequencies / 500000.0 ** (np.arange(0, 16, 2) / 16)
    source = write_with_tensor(tmp_path, original, "rope_freqs.weight", divisors.astype(np.float32))
    import_folder(source, tmp_path / "out", FLOAT32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == rule
    imported, _ = load(str(tmp_path / "out"))
    assert mx.allclose(imported(TOKENS), original(TOKENS), rtol=1e-5, atol=1e-5)


def test_other_rotary_table_is_refused(tmp_path):
    table = np.linspace(1, 3, 8).astype(np.float32)
    source = write_with_tensor(tmp_path, random_model("llama"), "rope_freqs.weight", table)
    with pytest.raises(UnsupportedModel, match="rotary factors"):
        plan_import(source)


def test_archive_with_one_gguf_file_is_taken(tmp_path, tiny):
    archive = tmp_path / "wheel.whl"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(tiny, "package/tiny.gguf")
        file.writestr("package/__init__.py", "")
    import_folder(archive, tmp_path / "out", FLOAT32)
    imported, _ = load(str(tmp_path / "out"))
    assert mx.array_equal(imported(TOKENS), random_model("llama")(TOKENS))


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_archive_without_exactly_one_gguf_file_is_refused(tmp_path, names):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "x")
        for name in names:
            file.writestr(name, "GGUF")
    with pytest.raises(UsageError, match="exactly one"), locate_gguf(archive):
        pass


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"), locate_gguf(tmp_path / "none.gguf"):
        pass
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"\x00" * 100)
    with pytest.raises(UsageError, match="not a GGUF file"):
        plan_import(foreign)


def test_other_version_is_refused(tmp_path, tiny):
    data = bytearray(tiny.read_bytes())
    data[4:8] = (1).to_bytes(4, "little")
    tiny.write_bytes(data)
    with pytest.raises(UsageError, match="version 1"):
        plan_import(tiny)


def test_incomplete_download_is_noticed(tiny):
    tiny.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="download is incomplete"):
        plan_import(tiny)


def test_non_finite_weights_are_refused_and_leave_nothing(tmp_path):
    model = random_model("llama")
    model.model.norm.weight[3] = float("nan")
    source = write_gguf(tmp_path / "m.gguf", model, "llama")
    with pytest.raises(UsageError, match=r"output_norm\.weight holds non-finite"):
        import_folder(source, tmp_path / "out", FLOAT32)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_unknown_family_names_the_supported_ones(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", random_model("llama"), "mamba")
    with pytest.raises(
        UnsupportedModel, match=r"'mamba' cannot be imported; supported: llama, qwen2, qwen3, gemma"
    ):
        plan_import(source)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, "mixture-of-experts"),
        ("llama.rope.dimension_count", 8, "8 of 16 values"),
        ("llama.rope.scaling.type", "yarn", "rotary scaling 'yarn'"),
    ],
)
def test_unsupported_features_are_refused(tmp_path, key, value, message):
    source = write_gguf(tmp_path / "m.gguf", random_model("llama"), "llama", **{key: value})
    with pytest.raises(UnsupportedModel, match=message):
        plan_import(source)


def test_tensor_without_a_place_is_refused(tmp_path):
    source = write_with_tensor(tmp_path, random_model("llama"), "blk.0.ssm_a", np.ones(64, np.float32))
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ssm_a"):
        plan_import(source)


def test_existing_output_is_refused_before_reading(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExists):
        import_folder(tmp_path / "none.gguf", tmp_path / "out", FLOAT32)


def test_full_disk_is_noticed_before_writing(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match=r"needs 0\.00 GB"):
        import_folder(tiny, tmp_path / "out", FLOAT32)
    assert not (tmp_path / "out").exists()


def test_merge_of_unknown_tokens_is_refused(tmp_path, monkeypatch):
    tokens, _, kinds = byte_level_vocabulary()
    monkeypatch.setattr("support_gguf.byte_level_vocabulary", lambda: (tokens, ["h q"], kinds))
    source = write_gguf(tmp_path / "m.gguf", random_model("llama"), "llama")
    with pytest.raises(UsageError, match="merge 'h q'"):
        plan_import(source)


def write_with_tensor(folder, model, name, values):
    """A GGUF file with one tensor more."""
    plain = write_gguf(folder / "plain.gguf", model, "llama")
    reader = gguf.GGUFReader(plain)
    extra = gguf.GGUFWriter(folder / "extra.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        extra.add_key_value(key, field.contents(), kind, item)
    for tensor in reader.tensors:
        extra.add_tensor(tensor.name, tensor.data)
    extra.add_tensor(name, values)
    extra.write_header_to_file()
    extra.write_kv_data_to_file()
    extra.write_tensors_to_file()
    extra.close()
    return folder / "extra.gguf"


def test_the_folder_records_what_it_was_imported_from(tmp_path, tiny):
    out = tmp_path / "out"
    import_folder(tiny, out, FLOAT32)
    record = json.loads((out / IMPORT_FILE).read_text())
    assert (record["file"], record["dtype"]) == ("tiny.gguf", "float32")
    assert set(record["stored_types"]) == {"F32"}
    origin = fingerprint(ModelRef(path=str(out), source="out")).origin
    assert origin == "imported from a GGUF file with unquantized weights (F32)"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ({"F32": 1, "Q4_1": 999}, "a Q4_1 GGUF file: its weights lie on a 4-bit grid"),
        ({"Q6_K": 100, "Q4_K": 300}, "a Q4_K GGUF file: its weights (75 % of them) lie on a 4-bit grid"),
        ({"Q8_0": 1}, "a Q8_0 GGUF file: its weights lie on a 8-bit grid"),
    ],
)
def test_origin_names_the_grid_most_weights_lie_on(tmp_path, stored, text):
    record = {"package_version": "1", "file": "m.gguf", "stored_types": stored, "dtype": "bfloat16"}
    assert weights_origin(tmp_path) == ""
    (tmp_path / IMPORT_FILE).write_text(json.dumps(record))
    assert text in weights_origin(tmp_path)
    (tmp_path / IMPORT_FILE).write_text("{}")
    with pytest.raises(ModelError, match="no record of an import"):
        weights_origin(tmp_path)
