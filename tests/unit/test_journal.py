"""What a journal keeps, what starts it anew, and how it ends."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support_tables import make_table

from mlx_optiq_ext import errors
from mlx_optiq_ext.measure.calibration import Windows
from mlx_optiq_ext.quant import journal as journal_module
from mlx_optiq_ext.quant import sources
from mlx_optiq_ext.quant.journal import Journal, discard_journal, journal_key, journal_path
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import CalibrationInfo, ModelFingerprint

MODEL = ModelFingerprint(model_type="llama", sha256="a" * 64)
TEXT = CalibrationInfo(source="x", sha256="b" * 64, num_tokens=64, num_windows=2, domains=("prose",))
WINDOWS = Windows(
    tokens=np.arange(64, dtype=np.int32).reshape(2, 32), domain_index=np.zeros(2, dtype=np.int32), info=TEXT
)
COSTS = np.array([[0.1, 0.2], [0.3, 0.4]])


def _key(**changed: Any) -> str:
    parts: dict[str, Any] = {
        "model": MODEL,
        "windows": WINDOWS,
        "options": MeasureOptions(),
        "float_dtype": "bf16",
    }
    return journal_key(**{**parts, **changed})


def test_units_come_back_in_a_second_run(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "journal"
    Journal.open(file, "key", resume=True).add("a.b", COSTS)
    again = Journal.open(file, "key", resume=True)
    np.testing.assert_array_equal(again.costs["a.b"], COSTS)


def test_what_is_continued_is_announced_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    first = Journal.open(file, "key", resume=True)
    assert first.announcement(3) == ""
    first.add("a", COSTS)
    assert first.announcement(3) == ""
    again = Journal.open(file, "key", resume=True)
    again.add("b", COSTS)
    where = journal_path(file, "key")
    assert again.announcement(3) == f"resuming: 1 of 3 tensors measured already, from {where}"


@pytest.mark.parametrize(("key", "resume"), [("other", True), ("key", False)])
def test_another_key_or_no_resume_starts_anew(tmp_path: Path, key: str, resume: bool) -> None:
    file = tmp_path / "journal"
    Journal.open(file, "key", resume=True).add("a", COSTS)
    assert Journal.open(file, key, resume=resume).costs == {}
    assert journal_path(file, key).read_bytes() == key.encode() + b"\n"


def test_journals_of_other_settings_stay_until_the_output_is_done(tmp_path: Path) -> None:
    file, other = tmp_path / "journal", tmp_path / "journal2"
    Journal.open(file, "k" * 64, resume=True).add("a", COSTS)
    Journal.open(file, "l" * 64, resume=False).finish(make_table(), 8)
    Journal.open(other, "k" * 64, resume=True)
    assert list(Journal.open(file, "k" * 64, resume=True).costs) == ["a"]
    discard_journal(file)
    assert list(tmp_path.iterdir()) == [journal_path(other, "k" * 64)]


@pytest.mark.parametrize(
    "changed",
    [
        {"model": replace(MODEL, sha256="c" * 64)},
        {"windows": replace(WINDOWS, info=replace(TEXT, sha256="c" * 64))},
        {"windows": replace(WINDOWS, tokens=WINDOWS.tokens + 1)},
        {"windows": replace(WINDOWS, tokens=WINDOWS.tokens.reshape(4, 16))},
        {"windows": replace(WINDOWS, domain_index=np.array([0, 1], dtype=np.int32))},
        {"float_dtype": "float32"},
        *(
            {"options": MeasureOptions(**{name: value})}
            for name, value in {
                "candidate_bits": "4,8", "candidate_groups": "32", "method": "kl", "correction": "none",
                "num_tokens": 128, "window": 64, "label_samples": 3, "seed": 1,
            }.items()
        ),
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_whatever_costs_depend_on_changes_the_key(changed: dict[str, Any]) -> None:
    assert _key(**changed) != _key()


def test_other_measuring_code_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _key()
    monkeypatch.setattr(journal_module, "measuring_code", lambda: "other")
    assert _key() != before


@pytest.mark.parametrize(("name", "value"), [("__version__", "99.0"), ("_FOLDERS", ("quant",))])
def test_another_version_or_other_sources_are_other_code(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    before = sources.measuring_code.__wrapped__()
    assert before == sources.measuring_code()
    monkeypatch.setattr(sources, name, value)
    assert sources.measuring_code.__wrapped__() != before


def test_other_versions_of_the_libraries_are_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.measuring_code()
    monkeypatch.setattr(sources, "version", lambda _name: "99.0")
    assert sources.measuring_code.__wrapped__() != before


def test_every_change_of_a_source_file_changes_their_hash(tmp_path: Path) -> None:
    def write(folder: str, **files: str) -> str:
        for name, text in files.items():
            (tmp_path / folder / "quant").mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "quant" / f"{name}.py").write_text(text)
        return sources.sources_hash([tmp_path / folder / "quant"])

    before = write("a", fit="x = 1", gptq="y = 2")
    assert write("elsewhere", gptq="y = 2", fit="x = 1") == before
    others = [
        write("edited", fit="x = 1 ", gptq="y = 2"),
        write("renamed", fit="x = 1", full="y = 2"),
        write("swapped", fit="y = 2", gptq="x = 1"),
        write("added", fit="x = 1", gptq="y = 2", more=""),
    ]
    assert len({before, *others}) == 5


def test_the_hashed_sources_are_those_that_measure() -> None:
    for name in ("measure/fisher", "models/tape", "quant/sensitivity", "quant/fit", "types/quant"):
        assert (sources._PACKAGE / f"{name}.py").is_file()
        assert name.split("/")[0] in sources._FOLDERS


@pytest.mark.parametrize("name", ["resume", "probes", "reference", "trust_remote_code"])
def test_how_it_is_run_does_not_change_the_key(name: str) -> None:
    value = {"resume": False, "probes": 3, "reference": "stream", "trust_remote_code": True}[name]
    assert _key(options=MeasureOptions(**{name: value})) == _key()


def test_the_finished_table_is_kept_under_its_key_and_probes_until_discarded(tmp_path: Path) -> None:
    file, table = tmp_path / "journal", make_table()
    Journal.open(file, "k" * 64, resume=True).finish(table, 8)
    assert Journal.open(file, "k" * 64, resume=True).finished(8) == table
    assert Journal.open(file, "k" * 64, resume=True).finished(0) is None
    assert Journal.open(file, "l" * 64, resume=True).finished(8) is None
    discard_journal(file)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_resume_forgets_the_finished_table(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    Journal.open(file, "k" * 64, resume=True).finish(make_table(), 8)
    assert Journal.open(file, "k" * 64, resume=False).finished(8) is None


def test_a_damaged_finished_table_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    Journal.open(file, "k" * 64, resume=True).finish(make_table(), 8)
    next(tmp_path.glob("*.table")).write_text("{")
    assert Journal.open(file, "k" * 64, resume=True).finished(8) is None


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    journal = Journal.open(None, "key", resume=True)
    journal.add("a", COSTS)
    journal.finish(make_table(), 8)
    assert journal.finished(8) is None
    assert list(journal.costs) == ["a"]


def test_a_full_disk_is_said_clearly(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal = Journal.open(file, "key", resume=True)
    journal_path(file, "key").unlink()
    journal_path(file, "key").mkdir()
    with pytest.raises(errors.ResourceError, match="cannot write"):
        journal.add("a", COSTS)
