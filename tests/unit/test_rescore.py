"""A score made after the conversion enters the folder's record, its metadata and its model card."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from support_tables import make_metadata, make_score, make_table

from mlx_optiq_ext.convert.describe import card_text
from mlx_optiq_ext.convert.rescore import is_own_record, record_score
from mlx_optiq_ext.formats.metadata import read_metadata, write_metadata
from mlx_optiq_ext.formats.score import read_score
from mlx_optiq_ext.formats.sensitivity import write_sensitivity
from mlx_optiq_ext.types.metadata import CheckpointMetadata

LICENSED = "---\nlicense: apache-2.0\n---\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint converted without a score, published under another name than its folder's."""
    made = tmp_path / "out"
    (made / "optiq").mkdir(parents=True)
    table = make_table(blocks=2)
    metadata = make_metadata(
        table,
        notes=("kept", "not scored: stopped by the user"),
    )
    write_metadata(made, metadata)
    write_sensitivity(made / "optiq" / "sensitivity.json", table)
    (made / "README.md").write_text(card_text(made, "me/out", LICENSED, metadata, table, None))
    return made


def test_record_metadata_and_card_say_the_same(folder: Path) -> None:
    assert "measured KL" not in (folder / "README.md").read_text()
    notes = record_score(folder, make_score())
    card, metadata = (folder / "README.md").read_text(), read_metadata(folder)
    assert isinstance(metadata, CheckpointMetadata)
    assert read_score(folder / "optiq" / "score.json") == make_score()
    assert metadata.measured is not None
    assert metadata.measured.divergence == 0.135
    assert "kept" in metadata.notes
    assert not any(note.startswith("not scored") for note in metadata.notes)
    assert "# me/out\n" in card
    assert "license: apache-2.0" in card
    assert "measured KL: 0.135 ± 0.011" in card
    assert "| **this model** |" in card
    assert "brought up to date" in notes[-1]


def test_a_second_score_replaces_what_the_first_said(folder: Path) -> None:
    record_score(folder, make_score())
    first = read_metadata(folder).notes  # type: ignore[union-attr]
    assert any("times the predicted" in note for note in first)
    score = make_score()
    predicted = read_metadata(folder).allocation.predicted_divergence  # type: ignore[union-attr]
    rows = tuple(replace(r, divergence=predicted) if r.role == "candidate" else r for r in score.rows)
    record_score(folder, replace(score, rows=rows))
    assert read_metadata(folder).notes == ("kept",)  # type: ignore[union-attr]
    assert "times the predicted" not in (folder / "README.md").read_text()


def test_stopped_in_between_the_same_score_ends_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_optiq_ext.convert.rescore.write_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            record_score(folder, make_score())
    assert not (folder / "optiq" / "score.json").exists()
    assert "brought up to date" in record_score(folder, make_score())[-1]


def test_an_edited_card_is_left_as_it_is(folder: Path) -> None:
    (folder / "README.md").write_text("# mine\n")
    assert "left as it is" in record_score(folder, make_score())[-1]
    assert (folder / "README.md").read_text() == "# mine\n"
    assert read_metadata(folder).measured is not None  # type: ignore[union-attr]


def test_only_the_record_of_our_own_folder_counts(folder: Path, tmp_path: Path) -> None:
    record = folder / "optiq" / "score.json"
    assert is_own_record(record, folder)
    assert not is_own_record(tmp_path / "score.json", folder)
    (folder / "optiq" / "metadata.json").unlink()
    assert not is_own_record(record, folder)
