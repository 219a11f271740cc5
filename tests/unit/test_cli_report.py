"""optiq report: what it reads, draws, writes and refuses."""

import json

import pytest
from support_tables import make_allocation, make_score, make_table

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.formats.metadata import write_metadata
from mlx_optiq_ext.formats.score import encode_score
from mlx_optiq_ext.formats.sensitivity import write_sensitivity
from mlx_optiq_ext.types.metadata import CheckpointMetadata

PARTS = ("metadata", "sensitivity", "score")


@pytest.fixture
def make_folder(tmp_path):
    def make(*parts):
        folder = tmp_path / "base-5.0"
        (folder / "optiq").mkdir(parents=True)
        table = make_table(blocks=4)
        if "metadata" in parts:
            metadata = CheckpointMetadata(
                package_version="1.0",
                base_model="example/base",
                model=table.model,
                method="fisher",
                reference="resident",
                calibration=table.calibration,
                allocation=make_allocation(table),
            )
            write_metadata(folder, metadata)
        if "sensitivity" in parts:
            write_sensitivity(folder / "optiq" / "sensitivity.json", table)
        if "score" in parts:
            (folder / "optiq" / "score.json").write_bytes(encode_score(make_score()))
        return folder

    return make


def test_a_whole_folder_is_drawn_without_colours_into_a_pipe(make_folder, capsys) -> None:
    assert main(["report", str(make_folder(*PARTS))]) == 0
    out = capsys.readouterr().out
    for text in (
        "Held-out comparison",
        "Bits against divergence",
        "best at each budget",
        "Bits by block",
        "Sensitivity:",
    ):
        assert text in out
    assert "\x1b" not in out
    assert "missing" not in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("metadata",), ("no optiq/sensitivity.json", "no optiq/score.json")),
        (("sensitivity",), ("no optiq/metadata.json", "no optiq/score.json")),
        (("score",), ("no optiq/metadata.json", "no optiq/sensitivity.json")),
    ],
)
@pytest.mark.parametrize("form", ["terminal", "html", "png"])
def test_missing_parts_are_named(make_folder, tmp_path, capsys, parts, words, form) -> None:
    out = [] if form == "terminal" else ["--out", str(tmp_path / f"r.{form}")]
    assert main(["report", str(make_folder(*parts)), "--format", form, *out]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in words)


def test_a_sensitivity_file_alone_shows_curve_and_sensitivity(make_folder, capsys) -> None:
    assert main(["report", str(make_folder("sensitivity") / "optiq" / "sensitivity.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("base-5.0\n")
    assert "best at each budget" in out
    assert "Sensitivity:" in out
    assert "Bits by block" not in out


def test_files_are_written_where_asked_and_said(make_folder, tmp_path, capsys) -> None:
    folder = make_folder(*PARTS)
    for form, start in (("html", b"<!doctype html>"), ("png", b"\x89PNG")):
        out = tmp_path / f"picture.{form}"
        assert main(["report", str(folder), "--format", form, "--out", str(out), "--json"]) == 0
        assert out.read_bytes().startswith(start)
        written = json.loads(capsys.readouterr().out)
        assert written["path"] == str(out)
        assert written["nbytes"] == out.stat().st_size


def test_json_holds_everything_that_is_drawn(make_folder, capsys) -> None:
    assert main(["report", str(make_folder(*PARTS)), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["heat_map"]["cells"]) == 28
    assert document["curve"]["chosen"]["label"] == "chosen"
    bpw = [point["bpw"] for point in document["curve"]["predicted"]]
    assert bpw == sorted(bpw)
    assert len(bpw) >= 20


def test_a_published_folder_shows_its_bits(tmp_path, capsys) -> None:
    choices = {
        f"model.layers.{i}.mlp.up_proj": {"bits": 4 + 4 * (i == 0), "group_size": 64} for i in range(3)
    }
    (tmp_path / "optiq_metadata.json").write_text(json.dumps({"base_model": "a/b", "per_layer": choices}))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "up_proj  8  4  4" in out
    assert "predicted KL  0" not in out


@pytest.mark.parametrize("words", [["nowhere"], ["."], [".", "--out", "x.txt"]])
def test_nothing_to_show_is_a_usage_error(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert "optiq: " in capsys.readouterr().err
