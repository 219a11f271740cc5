"""``optiq lora info|merge|fuse|export`` on a tiny base."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as stock_load_model
from support_hub import FakeHub, serve, use_hub
from support_lora import ALL_TARGETS, TOKENS, adapt, quantized_model
from support_models import LLAMA, byte_tokenizer

from mlx_optiq_ext.cli.lora.fuse import fuse_text
from mlx_optiq_ext.cli.lora.merge import parse_part
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import AdapterError, FingerprintMismatch, ModelNotFound, OutputExists, UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.files import describe_adapter, read_adapter, save_adapter
from mlx_optiq_ext.lora.fuse_folder import FuseResult
from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.report import rank_report
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import BitMap
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.report import draw_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, ``base``, ``one`` and ``two``."""
    root = tmp_path_factory.mktemp("lora")
    model = quantized_model("4g64")
    (root / "base").mkdir()
    writer = CheckpointWriter(root / "base")
    for name, array in tree_flatten(model.parameters()):
        writer.add(name, array)
    choices = {t.path: t.choice for t in list_targets(model) if t.choice is not None}
    writer.finish(dict(LLAMA), BitMap(choices=choices), tokenizer=byte_tokenizer(320))
    base = fingerprint(ModelRef(path=str(root / "base"), source="base"))
    for seed, name in enumerate(("one", "two")):
        adapted = quantized_model("4g64")
        paths = [t.path for t in list_targets(adapted) if t.kind != "embedding"]
        rank_map = adapt(adapted, {path: 1 + k % 4 for k, path in enumerate(paths)}, seed=seed)
        config = describe_adapter(rank_map, AdapterOptions(targets=ALL_TARGETS), base=base)
        save_adapter(root / name, adapted, config)
    return root


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code = main([*words, "--json", "--quiet"])
    answer = json.loads(capsys.readouterr().out)
    return answer if code == 0 else {"exit": code, **answer}


def test_info_says_what_the_adapter_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = document(capsys, "lora", "info", str(folder / "one"), "--model", str(folder / "base"))
    assert (info["form"], info["fits"], info["remark"]) == ("optiq", True, "")
    ranks = info["config"]["ranks"]
    assert len(ranks) == 14
    assert info["num_parameters"] == sum(
        factors.num_parameters for factors in read_adapter(folder / "one").factors.values()
    )
    assert info["nbytes"] == 4 * info["num_parameters"]
    assert main(["lora", "info", str(folder / "one")]) == 0
    text = capsys.readouterr().out
    assert "Rank by block and module" in text
    assert "Ranks by module" in text
    assert f"{info['num_parameters']:,}" in text


def test_info_says_when_it_does_not_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    writer = CheckpointWriter(base)
    config = {**LLAMA, "num_hidden_layers": 1}
    for name, array in tree_flatten(quantized_model("keep", config).parameters()):
        writer.add(name, array)
    writer.finish(config, BitMap(choices={}), tokenizer=byte_tokenizer(320))
    info = document(capsys, "lora", "info", str(folder / "one"), "--model", str(base))
    assert info["fits"] is False
    assert "made for another" in info["remark"]


def test_merge_writes_the_sum(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["lora", "merge", str(folder / "one"), f"{folder / 'two'}=-0.5", "-o", str(tmp_path / "sum")]
    result = document(capsys, *words)
    assert result["parts"] == {str(folder / "one"): 1.0, str(folder / "two"): -0.5}
    assert result["max_rank"] == 8
    parts = [read_adapter(folder / name).factors for name in ("one", "two")]
    for path, factors in read_adapter(tmp_path / "sum").factors.items():
        expected = parts[0][path].a @ parts[0][path].b - 0.5 * parts[1][path].a @ parts[1][path].b
        np.testing.assert_allclose(factors.a @ factors.b, expected, rtol=0, atol=1e-6)
    again = document(capsys, *words)
    assert (again["exit"], again["error"]["type"]) == (OutputExists.exit_code, "OutputExists")


def test_a_weight_belongs_to_its_folder(tmp_path: Path) -> None:
    assert parse_part("a/b=0.5") == ("a/b", 0.5)
    assert parse_part("a/b") == ("a/b", 1.0)
    (tmp_path / "x=2").mkdir()
    assert parse_part(str(tmp_path / "x=2")) == (str(tmp_path / "x=2"), 1.0)
    with pytest.raises(UsageError, match="'half' is no weight"):
        parse_part("a=half")
    with pytest.raises(UsageError, match="'nan' is no weight"):
        parse_part("a=nan")


def test_fuse_writes_a_model_and_says_what_rounding_adds(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, adapter = str(folder / "base"), str(folder / "one")
    words = ["lora", "fuse", base, adapter, "-o", str(tmp_path / "out"), "--num-tokens", "512"]
    result = document(capsys, *words)
    assert result["num_modules"] == 14
    assert result["added"] > 0
    assert result["change"] > 0
    model, config = stock_load_model(tmp_path / "out")
    assert model(TOKENS).shape == (2, 8, 320)
    assert config["quantization"]["bits"] == 4
    assert (
        main([*words[:5], str(tmp_path / "dense"), "--store", "dense", "--num-tokens", "256", "--quiet"]) == 0
    )
    text = capsys.readouterr().out
    assert "the adapter changes the base by" in text
    assert "Storing the sum costs" not in text  # unquantized
    costly = FuseResult(
        folder="out", store="same", num_modules=1, nbytes=1, change=0.06, added=0.05, num_windows=2
    )
    assert "Storing the sum costs much" in fuse_text(costly)
    assert main([*words[:5], str(tmp_path / "x"), "--num-tokens", "-1"]) == UsageError.exit_code


def test_fuse_refuses_another_base(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "base"
    other.mkdir()
    writer = CheckpointWriter(other)
    for name, array in tree_flatten(quantized_model("keep", seed=5).parameters()):
        writer.add(name, array)
    writer.finish(dict(LLAMA), BitMap(choices={}), tokenizer=byte_tokenizer(320))
    words = ["lora", "fuse", str(other), str(folder / "one"), "-o", str(tmp_path / "out")]
    result = document(capsys, *words)
    assert (result["exit"], result["error"]["type"]) == (FingerprintMismatch.exit_code, "FingerprintMismatch")
    assert not (tmp_path / "out").exists()


def test_export_writes_every_form_and_reads_them_back(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = read_adapter(folder / "one")
    for form, files in {
        "peft": ["adapter_config.json", "adapter_model.safetensors"],
        "mlx-lm": ["adapter_config.json", "adapters.safetensors"],
        "optiq": ["adapter_config.json", "adapters.safetensors", "optiq/adapters.safetensors"],
    }.items():
        out = tmp_path / form
        result = document(capsys, "lora", "export", str(folder / "one"), "--to", form, "-o", str(out))
        assert result["files"] == files
        again = read_adapter(out)
        for path, factors in source.factors.items():
            rank = 4 if form == "mlx-lm" else factors.rank
            assert again.factors[path].rank == rank
            np.testing.assert_array_equal(again.factors[path].a[:, : factors.rank], factors.a)
    imported = tmp_path / "imported"
    document(capsys, "lora", "export", str(tmp_path / "peft"), "--to", "optiq", "-o", str(imported))
    assert read_adapter(imported).config.ranks == source.config.ranks
    stock = quantized_model("4g64")
    load_adapters(stock, str(tmp_path / "mlx-lm"))
    assert stock(TOKENS).shape == (2, 8, 320)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one of the adapters as ``org/style``, and a model that is no adapter as ``org/model``."""
    hub = FakeHub()
    files = [file for file in (folder / "one").rglob("*") if file.is_file()]
    hub.repositories["org/style"] = {
        **{str(file.relative_to(folder / "one")): file.read_bytes() for file in files},
        "README.md": b"words",
        "model.safetensors": b"weights",
    }
    hub.repositories["org/model"] = {"config.json": b"{}", "model.safetensors": b"weights"}
    with serve(hub):
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_hub_ids_stand_where_folders_do(
    hub: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = read_adapter(folder / "one")
    info = document(capsys, "lora", "info", "org/style")
    assert (info["form"], info["source"], info["config"]["ranks"]) == (
        "optiq", "org/style", source.config.ranks
    )  # fmt: skip
    assert not {"README.md", "model.safetensors"} & set(hub.downloads())
    merged = document(
        capsys, "lora", "merge", "org/style=0.5", str(folder / "two"), "-o", str(tmp_path / "sum")
    )
    assert merged["parts"] == {"org/style": 0.5, str(folder / "two"): 1.0}
    facts = read_adapter(tmp_path / "sum").config.training
    assert facts.settings == merged["parts"]
    base = str(folder / "base")
    words = ["lora", "fuse", base, "org/style", "-o", str(tmp_path / "fused"), "--num-tokens", "0"]
    assert document(capsys, *words)["num_modules"] == len(source.factors)
    document(capsys, "lora", "export", "org/style", "-o", str(tmp_path / "peft"))
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    assert main(["lora", "info", "org/style"]) == 0
    assert "org/style: adapter" in capsys.readouterr().out


def test_an_adapter_that_is_nowhere_is_explained(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    for source, said in {
        "org/model": "has no adapter_config.json",
        "org/nothing": "is not on the Hub",
        "adapters/nothing": "no adapter folder adapters/nothing here; as a Hub id",
        "./nothing": "no adapter folder ./nothing; give an existing folder",
    }.items():
        result = document(capsys, "lora", "info", source)
        assert (result["exit"], result["error"]["type"]) == (ModelNotFound.exit_code, "ModelNotFound")
        assert said in result["error"]["message"]
    assert "model.safetensors" not in hub.downloads()


def test_an_adapter_error_has_its_exit_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = document(capsys, "lora", "info", str(tmp_path))
    assert (result["exit"], result["error"]["type"]) == (AdapterError.exit_code, "AdapterError")


def test_a_group_without_a_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora"]) == 2
    assert "lora merge" in capsys.readouterr().err
    assert main(["lora", "--help"]) == 0
    out = capsys.readouterr().out
    assert "lora fuse" in out
    assert "doctor" not in out
    assert main(["lora", "melt"]) == 2
    assert "no command 'lora melt'; commands are lora " in capsys.readouterr().err


def test_the_rank_map_is_shown_as_a_table_and_a_map() -> None:
    model = quantized_model("4g64")
    ranks = plan_ranks(model, AdapterOptions(rank=3, targets=ALL_TARGETS, rank_scaling="constant"))
    report = rank_report("ranks", ranks)
    assert report.bits is not None
    rows = {row[0]: row for row in report.bits.rows}
    assert rows["q_proj"][1:5] == ("2", "3", "3.0", "3")
    assert report.heat_map is not None
    assert {cell.path for cell in (*report.heat_map.cells, *report.heat_map.outside)} == set(ranks.ranks)
    text = draw_report(report, Style(colors="none", width=80))
    assert "constant at rank 3" in text
    assert f"{ranks.num_parameters:,}" in text
