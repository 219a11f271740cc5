"""What a conversion makes of its own score, of a failure to score, and of a given sensitivity file."""

from pathlib import Path
from typing import Any

import pytest
from support_measure import quick_options, save_tiny, write_calibration
from support_tables import make_allocation, make_score, make_table

from mlx_optiq_ext import errors
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.convert import scoring
from mlx_optiq_ext.convert.given import calibration_notes, restrict_candidates
from mlx_optiq_ext.convert.model import convert_model, work_folder
from mlx_optiq_ext.convert.scoring import score_notes
from mlx_optiq_ext.formats.metadata import read_metadata
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.score import ScoreReport, ScoreRow


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "text.jsonl")


def _options(text: Path) -> ConvertOptions:
    return ConvertOptions(measure=quick_options(text), allocate=AllocateOptions(target_bpw=5.0), verify=False)


@pytest.mark.parametrize("kind", [errors.FingerprintMismatch, errors.UsageError, errors.ResourceError])
def test_failed_scoring_keeps_the_checkpoint_and_says_why(
    ref: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("no luck")

    monkeypatch.setattr(scoring, "score", fail)
    result = convert_model(ref, _options(text), tmp_path / "out")
    assert result.score is None
    assert "not scored: no luck" in result.notes
    assert "not scored: no luck" in read_metadata(tmp_path / "out").notes  # type: ignore[union-attr]


def test_stopping_while_it_scores_leaves_a_complete_checkpoint(
    ref: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "score", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as stopped:
        convert_model(ref, _options(text), out)
    assert stopped.value.__notes__ == [
        f"{out} is complete but not scored; "
        f"`optiq score {ref.source} {out} --uniform 4,5,6 -o {out}/optiq/score.json` does that"
    ]
    assert "not scored: stopped by the user" in read_metadata(out).notes  # type: ignore[union-attr]
    assert (out / "README.md").is_file()
    assert not work_folder(out).exists()


def _report(divergence: float, ratio: float, interval: tuple[float, float], nbytes: int) -> ScoreReport:
    shared: dict[str, Any] = {"top1": 0.9, "perplexity": 9.0}
    own = ScoreRow(label="own", bpw=5.0, nbytes=1000, divergence=divergence, **shared)
    uniform = ScoreRow(
        label="uniform 4g64", role="uniform", bpw=nbytes / 200, nbytes=nbytes, divergence=divergence * ratio,
        against_first=ratio, against_first_interval=interval, **shared,
    )  # fmt: skip
    return ScoreReport(reference="r", held_out=make_score().held_out, rows=(own, uniform))


def test_notes_appear_only_where_the_score_contradicts_the_plan() -> None:
    allocation = make_allocation(make_table(blocks=1))
    predicted = allocation.predicted_divergence
    assert score_notes(_report(predicted, 1.2, (1.1, 1.3), 900), allocation) == ()
    assert score_notes(_report(predicted, 0.9, (0.7, 1.1), 900), allocation) == ()
    assert score_notes(_report(predicted, 0.8, (0.7, 0.9), 1001), allocation) == ()
    (warning,) = score_notes(_report(predicted, 0.8, (0.7, 0.9), 1000), allocation)
    assert warning.startswith("warning: uniform 4g64 is closer to the reference with no more bits")
    for factor in (0.4, 2.5):
        report = _report(factor * predicted, 1.2, (1.1, 1.3), 900)
        (note,) = score_notes(report, allocation)
        assert f"{factor:.2g} times the predicted" in note
        assert score_notes(report, allocation, has_prediction=False) == ()


def test_a_given_file_refuses_measuring_options_and_offers_only_its_candidates(
    ref: ModelRef, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_model(ref, _options(text), tmp_path / "first")
    words = ["convert", ref.path, "--target-bpw", "5", "--sensitivity", str(tmp_path / "first")]
    words += ["-o", str(tmp_path / "out"), "--no-score", "--no-verify"]
    assert main([*words, "--probes", "8", "--method", "fisher"]) == 2
    assert "--method, --probes would have no effect" in capsys.readouterr().err
    assert main([*words, "--candidate-bits", "4,6"]) == 2
    assert "does not hold 6g64; measured are 2g64, 4g64, 8g64" in capsys.readouterr().err
    assert main([*words, "--correction", "none"]) == 2
    assert "was measured with --correction fast, not with --correction none" in capsys.readouterr().err
    assert main([*words, "--candidate-bits", "4,8"]) == 0
    assert read_metadata(tmp_path / "out").allocation.correction == "fast", "that of the file"
    assert {c.label for c in read_metadata(tmp_path / "out").bit_map.choices.values()} <= {"4g64", "8g64"}


def test_groups_alone_restrict_and_text_is_noted(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    convert_model(ref, _options(text), tmp_path / "first")
    table = read_sensitivity(tmp_path / "first")
    assert restrict_candidates(table, MeasureOptions(), ()) == table
    assert restrict_candidates(table, MeasureOptions(), ("candidate_groups",)) == table
    with pytest.raises(errors.UsageError, match="group 32"):
        restrict_candidates(table, MeasureOptions(candidate_groups="32"), ("candidate_groups",))
    assert "give --calibration again" in calibration_notes(table, MeasureOptions())[0]
    assert calibration_notes(table, quick_options(text)) == ()
