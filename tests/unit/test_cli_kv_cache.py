"""``optiq kv-cache`` and ``optiq score --kv-config``, from arguments to files, on a tiny model folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_models import LLAMA, save_model_folder, tiny_model

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.convert import kv_cache
from mlx_optiq_ext.formats.kv_config import read_kv_config
from mlx_optiq_ext.formats.kv_sensitivity import kv_sensitivity_sha256, read_kv_sensitivity

SETTINGS = ("--context", "64", "--num-tokens", "256", "--candidate-bits", "3,4,6", "--candidate-groups", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("kv") / "tiny", tiny_model(), LLAMA)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags of a text for measuring and one for comparing."""
    rng = np.random.default_rng(5)
    flags: list[str] = []
    for flag in ("--calibration", "--held-out"):
        lines = [
            json.dumps({"domain": "letters", "text": "".join(chr(c) for c in rng.integers(97, 123, 70))})
            for _ in range(16)
        ]
        path = tmp_path_factory.mktemp("text") / "text.jsonl"
        path.write_text("\n".join(lines))
        flags += [flag, str(path)]
    return tuple(flags)


def plan(model: Path, out: Path, *more: str) -> int:
    return main(["kv-cache", str(model), "-o", str(out), *SETTINGS, *more])


@pytest.fixture(scope="module")
def planned(model: Path, text: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planned")
    assert plan(model, out, "--target-bits", "5.5", "--quiet", *text) == 0
    return out


def test_both_files_are_written_and_belong_together(planned: Path) -> None:
    config, table = read_kv_config(planned), read_kv_sensitivity(planned / "kv_sensitivity.json")
    assert config.bits_per_number <= 5.5
    assert config.sensitivity_sha256 == kv_sensitivity_sha256(table)
    assert [layer.index for layer in config.layers] == [0, 1]
    # 2 blocks, 2 key-value heads of 32 numbers, keys and values.
    assert config.bytes_per_token == pytest.approx(config.bits_per_number * 2 * 2 * 2 * 32 / 8)
    assert sum(score.accepted for score in table.scores) == 1


def test_another_target_measures_nothing_again(
    model: Path, text: tuple[str, ...], planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(kv_cache, "estimate_divergences", never)
    assert plan(model, planned, "--target-bits", "4.5", "--force", "--json", *text) == 0
    captured = capsys.readouterr()
    assert "nothing is measured again" in captured.err
    found = json.loads(captured.out)
    assert found["config"]["bits_per_number"] <= 4.5
    assert read_kv_config(found["config_file"]).bits_per_number == found["config"]["bits_per_number"]


def test_other_settings_are_measured_anew(
    model: Path, text: tuple[str, ...], planned: Path, tmp_path: Path
) -> None:
    (tmp_path / "kv_sensitivity.json").write_bytes((planned / "kv_sensitivity.json").read_bytes())
    assert plan(model, tmp_path, "--target-bits", "5.5", "--no-rotate", "--quiet", *text) == 0
    assert not read_kv_sensitivity(tmp_path / "kv_sensitivity.json").rotate
    assert not read_kv_config(tmp_path).rotate


def test_the_context_that_fits_is_said(
    model: Path, text: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    assert plan(model, tmp_path, "--target-bits", "5.5", "--fit", "8GB", "--json", *text) == 0
    assert json.loads(capsys.readouterr().out)["fitting_context"] > 1_000_000


def test_a_context_that_fits_beyond_what_the_model_was_made_for_is_said(
    text: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    config = {**LLAMA, "max_position_embeddings": 2048}
    short = save_model_folder(tmp_path / "short", tiny_model(config), config)
    assert plan(short, tmp_path, "--target-bits", "5.5", "--fit", "8GB", "--quiet", *text) == 0
    assert "the model's config names 2,048 positions" in " ".join(capsys.readouterr().out.split())


def test_what_is_there_is_not_replaced(model: Path, planned: Path, capsys: Any) -> None:
    before = (planned / "kv_config.json").read_bytes()
    assert plan(model, planned) == 2
    assert "--force" in capsys.readouterr().err
    assert (planned / "kv_config.json").read_bytes() == before


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("mine")
    assert plan(model, tmp_path / "file") == 2
    assert "is a file; name the folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_nothing_meets_is_refused_before_anything_is_measured(
    model: Path, text: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    assert plan(model, tmp_path / "new", "--target-bits", "2", *text) != 0
    assert "below the cheapest storage" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--calibration", "--held-out"])
def test_text_that_is_too_short_is_refused_once_before_anything_is_measured(
    model: Path, text: tuple[str, ...], tmp_path: Path, capsys: Any, flag: str
) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"domain": "letters", "text": "short"}))
    assert plan(model, tmp_path / "new", *text, flag, str(short), "--quiet") != 0
    said = capsys.readouterr().err
    assert said.count("has 5 tokens: no prefix of 64") == 1
    assert f"give a longer text with {flag}" in said
    assert not (tmp_path / "new").exists()


def test_a_budget_that_saves_nothing_is_said(
    model: Path, text: tuple[str, ...], planned: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "kv_sensitivity.json").write_bytes((planned / "kv_sensitivity.json").read_bytes())
    assert plan(model, tmp_path, "--target-bits", "16", "--quiet", *text) == 0
    assert "nothing is saved: every cache stays in full precision" in " ".join(
        capsys.readouterr().out.split()
    )


def test_memory_that_the_weights_fill_is_refused_before_anything_is_measured(
    model: Path, text: tuple[str, ...], tmp_path: Path, capsys: Any
) -> None:
    assert plan(model, tmp_path / "new", "--fit", "10MB", *text) != 0
    assert "no room is left for a KV cache" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def score(*words: str | Path) -> int:
    return main(["score", *map(str, words)])


def test_scores_of_caches_by_length(
    model: Path, text: tuple[str, ...], planned: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "scores.json"
    flags = ("--kv-config", planned, "--kv-uniform", "8,3,k6g32v4", "--lengths", "64,128,9999", *text[2:])
    assert score(model, model, *flags, "--num-tokens", "256", "--json", "-o", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    caches = ["full precision", "configured", "uniform 8", "uniform 3", "uniform k6g32v4"]
    rows = found["rows"]
    assert [row["cache"] for row in rows] == [name for _ in range(2) for name in caches for _ in range(2)]
    assert [row["length"] for row in rows[:4]] == [64, 128, 64, 128]
    assert any("no prefix of 9999" in note for note in found["notes"])
    # The second checkpoint is the first one again: equal to rounding in the last digit of float32.
    for one, other in zip(rows[:10], rows[10:], strict=True):
        assert other["divergence"] == pytest.approx(one["divergence"], rel=1e-3, abs=1e-6)
    for length in (0, 1):
        full, _, eight, three, pair = rows[length:10:2]
        assert full["divergence"] < 1e-6
        assert full["divergence"] < eight["divergence"] < pair["divergence"] < three["divergence"]
        # Heads of 32 numbers: group 32, the largest that divides them, adds a whole bit.
        assert [r["bits_per_number"] for r in (full, eight, three, pair)] == [16, 9, 4, 6]
        assert eight["bytes_per_token"] == 9 * 256 / 8
        assert eight["divergence_half_width"] > 0


def test_context_means_the_same_prefixes_as_when_measuring(
    model: Path, text: tuple[str, ...], capsys: Any
) -> None:
    flags = ("--kv-uniform", "8", "--context", "320", *text[2:], "--num-tokens", "64", "--json")
    assert score(model, *flags) == 0
    assert [row["length"] for row in json.loads(capsys.readouterr().out)["rows"]] == [256, 320] * 2


def test_a_configuration_of_a_model_with_other_heads_says_what_differs(
    model: Path, text: tuple[str, ...], planned: Path, tmp_path: Path, capsys: Any
) -> None:
    for changed, difference in (
        ({"num_key_value_heads": 1}, "2 heads of 32 in cache 0, this model has 1 heads of 32"),
        ({"num_hidden_layers": 3}, "2 caches, this model has 3"),
    ):
        config = {**LLAMA, **changed}
        other = save_model_folder(tmp_path / next(iter(changed)), tiny_model(config), config)
        assert score(other, "--kv-config", planned, "--lengths", "64", *text[2:]) != 0
        said = capsys.readouterr().err
        assert f"was made for {model} with {difference}" in said
        assert "optiq kv-cache MODEL" in said


def test_hidden_facts_are_the_same_at_every_run_and_a_random_model_finds_none(
    model: Path, text: tuple[str, ...], capsys: Any
) -> None:
    flags = (
        "--kv-uniform",
        "8",
        "--lengths",
        "64,320",
        "--needle",
        *text[2:],
        "--num-tokens",
        "64",
        "--json",
    )
    documents = []
    for _ in range(2):
        assert score(model, *flags) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    # 64 tokens have no room for the fact and the question of a byte tokenizer.
    assert [(c["length"], c["depth"]) for c in documents[0]["needles"]] == [
        (320, depth) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert any("finds 0 of 5 hidden facts" in note for note in documents[0]["notes"])


def test_tables_show_every_cache_and_the_grid(model: Path, text: tuple[str, ...], capsys: Any) -> None:
    long_name = model.parent / "a-model-with-a-name-of-forty-characters-1"
    long_name.symlink_to(model)
    flags = ("--kv-uniform", "4", "--lengths", "320", "--needle", *text[2:], "--num-tokens", "64", "--quiet")
    assert score(model, long_name, *flags) == 0
    out = capsys.readouterr().out
    assert "uniform 4" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "Hidden facts: tiny, uniform 4" in out
    assert "100%" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--needle",), "--needle needs a KV cache"),
        (("--kv-uniform", "7"), "is not a choice"),
        (("--kv-uniform", "mxfp4"), "affine codes"),
        (("--kv-uniform", "4", "--lengths", "x"), "--lengths 'x'"),
        (("--kv-uniform", "4", "--uniform", "4"), "run optiq score twice"),
        (("--kv-uniform", "4", "-o", "optiq/score.json"), "own record"),
        (("--kv-config", "missing.json"), "missing.json"),
        ((), "nothing to score"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: Path, flags: tuple[str, ...], message: str, capsys: Any
) -> None:
    assert score(model, *flags) == 2
    assert message in capsys.readouterr().err
