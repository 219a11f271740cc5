"""Commands do not replace a file that nobody said may be replaced, and pass on what the model may run."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support_measure import save_tiny
from support_tables import make_table

from mlx_optiq_ext.cli.commands import convert, measure, score
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.types.model import ModelRef


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


def _measure(ref: ModelRef, out: Path, *words: str) -> int:
    return main(["measure", ref.path, "-o", str(out), "--method", "static", *words])


def test_measure_replaces_a_table_of_the_same_model(ref: ModelRef, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    write_sensitivity(out, replace(make_table(), model=fingerprint(ref)))
    assert _measure(ref, out) == 0
    assert read_sensitivity(out).method == "static"


@pytest.mark.parametrize("is_table", [True, False])
def test_measure_replaces_anything_else_only_with_force(
    ref: ModelRef, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_table: bool
) -> None:
    out = tmp_path / "table.json"
    if is_table:
        write_sensitivity(out, make_table())
    else:
        out.write_text("notes")
    before = out.read_bytes()
    assert _measure(ref, out) == 2
    assert "add --force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert _measure(ref, out, "--force") == 0
    assert read_sensitivity(out).model.sha256 == fingerprint(ref).sha256


def test_allocate_replaces_a_file_only_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "table.json", tmp_path / "map.json"
    write_sensitivity(table, make_table())
    out.write_text("notes")
    words = ["allocate", str(table), "--target-bpw", "5", "-o", str(out)]
    assert main(words) == 2
    assert "add --force" in capsys.readouterr().err
    assert out.read_text() == "notes"
    assert main([*words, "--force"]) == 0
    assert out.read_text() != "notes"


def test_score_refuses_an_existing_file_before_it_looks_for_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "score.json"
    out.write_text("notes")
    assert main(["score", str(tmp_path / "no-model"), "--uniform", "4", "-o", str(out)]) == 2
    assert "add --force" in capsys.readouterr().err


def test_a_folder_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", str(tmp_path / "no-model"), "--uniform", "4", "-o", str(tmp_path), "--force"]
    assert main(words) == 2
    assert "is a folder" in capsys.readouterr().err


class _Stop(BaseException):
    pass


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (convert, ["convert", "a/b", "-o", "out", "--target-bpw", "5"]),
        (measure, ["measure", "a/b"]),
        (score, ["score", "a/b", "--uniform", "4"]),
    ],
    ids=["convert", "measure", "score"],
)
@pytest.mark.parametrize("trust", [True, False])
def test_python_files_are_fetched_where_they_may_be_run(
    module: Any, words: list[str], trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def resolve(*_: object, **keywords: object) -> None:
        asked.update(keywords)
        raise _Stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "resolve_model", resolve)
    with pytest.raises(_Stop):
        main([*words, *(["--trust-remote-code"] if trust else [])])
    assert asked["trust_remote_code"] is trust
