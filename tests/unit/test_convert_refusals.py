"""What cannot work is refused with a clear error and exit code before the model is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support_measure import forbid_forward, quick_options, save_tiny, write_calibration
from support_models import LLAMA, quantize_by, save_model_folder, tiny_model

from mlx_optiq_ext import errors
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.convert.model import convert_model, work_folder
from mlx_optiq_ext.convert.table import read_table
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.quant.reference import open_reference
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import BitMap, Choice


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_forward(monkeypatch)


def _options(text: Path, target: float | None = 5.0, **allocate: Any) -> ConvertOptions:
    return ConvertOptions(
        measure=quick_options(text), allocate=AllocateOptions(target_bpw=target, **allocate), score=False
    )


def _leaves_nothing(out: Path) -> None:
    assert not out.exists()
    assert not work_folder(out).exists()
    assert not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_an_output_that_exists(ref: ModelRef, text: Path, tmp_path: Path, make: Any) -> None:
    out = tmp_path / "out"
    make(out)
    with pytest.raises(errors.OutputExists, match="already exists"):
        convert_model(ref, _options(text), out)


def test_no_target(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="no target: give --target-bpw"):
        convert_model(ref, _options(text, None), tmp_path / "out")
    _leaves_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (
            {"sensitivity": None},
            (),
            "--allocation needs --sensitivity: the file that map.json was chosen from",
        ),
        ({"allocate": AllocateOptions(target_bpw=5.0)}, (), "--target-bpw would have no effect"),
        (
            {"allocate": AllocateOptions(pin=("*=4",), solver="greedy")},
            (),
            "--allocation takes the place of choosing, and --pin, --solver would have no effect",
        ),
        ({}, ("candidate_bits",), "--candidate-bits would have no effect"),
        ({}, ("method",), "--sensitivity takes the place of a measurement, and --method would have"),
    ],
)
def test_what_does_not_go_with_a_bit_map(
    ref: ModelRef, tmp_path: Path, settings: dict[str, Any], given: tuple[str, ...], message: str
) -> None:
    files = {"sensitivity": "table.json", "allocation": "map.json"}
    with pytest.raises(errors.UsageError, match=message):
        convert_model(ref, ConvertOptions(**(files | settings)), tmp_path / "out", given=given)
    _leaves_nothing(tmp_path / "out")


def test_two_targets(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError):
        convert_model(ref, _options(text, 5.0, target_size="1MB"), tmp_path / "out")


@pytest.mark.parametrize(
    "target", [{"target": 2.0}, {"target": None, "target_size": "10kB"}, {"target": None, "fit": "20kB"}]
)
def test_a_budget_below_the_cheapest_choice(
    ref: ModelRef, text: Path, tmp_path: Path, target: dict[str, Any]
) -> None:
    with pytest.raises(errors.BudgetInfeasible, match=r"raise|below|larger"):
        convert_model(ref, _options(text, **target), tmp_path / "out")
    _leaves_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    ("pin", "words"),
    [("model.nothing.*=8", "nothing"), ("lm_head", "="), ("*=9", "9"), ("*down_proj=4g48", "4g48")],
)
def test_a_pin_that_means_nothing(ref: ModelRef, text: Path, tmp_path: Path, pin: str, words: str) -> None:
    with pytest.raises(errors.UsageError, match=words):
        convert_model(ref, _options(text, pin=(pin,)), tmp_path / "out")
    _leaves_nothing(tmp_path / "out")


def test_a_quantized_source(text: Path, tmp_path: Path) -> None:
    model = tiny_model()
    four = Choice(bits=4, group_size=64)
    bit_map = BitMap(choices={f"model.layers.{i}.mlp.up_proj": four for i in range(2)})
    quantize_by(model, bit_map)
    save_model_folder(tmp_path / "m", model, LLAMA, bit_map)
    ref = ModelRef(path=str(tmp_path / "m"), source="m")
    with pytest.raises(errors.UnsupportedModel, match="quantized already"):
        convert_model(ref, _options(text), tmp_path / "out")


def test_an_unsupported_family(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(ref.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    with pytest.raises(errors.UnsupportedModel, match=r"no_such_family"):
        convert_model(ModelRef(path=str(folder), source="m"), _options(text), tmp_path / "out")


@pytest.mark.parametrize("damage", ["no config", "config is no JSON", "no weights", "cut weights"])
def test_a_damaged_model_folder(ref: ModelRef, text: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(ref.path, folder)
    weights = folder / "model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(errors.ModelError) as caught:
        convert_model(ModelRef(path=str(folder), source="m"), _options(text), tmp_path / "out")
    assert caught.value.exit_code == 3
    _leaves_nothing(tmp_path / "out")


def test_a_full_disk(ref: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(errors.ResourceError, match="not enough disk space") as caught:
        convert_model(ref, _options(text), tmp_path / "out")
    assert caught.value.exit_code == 6
    _leaves_nothing(tmp_path / "out")


def test_too_little_memory_for_a_resident_reference(
    ref: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_optiq_ext.quant.reference.available_nbytes", lambda: 1000)
    options = ConvertOptions(
        measure=quick_options(text, reference="resident"), allocate=AllocateOptions(target_bpw=5.0)
    )
    with pytest.raises(errors.ResourceError, match="--reference stream"):
        convert_model(ref, options, tmp_path / "out")


def test_a_missing_calibration_file(ref: ModelRef, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="absent"):
        convert_model(ref, _options(tmp_path / "absent.jsonl"), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--target-bpw", "5"], 3),
        (["--target-bpw", "0.5"], 2),
        (["--target-bpw", "5", "--method", "guess"], 2),
        (["--target-bpw", "5", "--no-such-flag"], 2),
    ],
)
def test_the_command_line_returns_the_errors_code(
    tmp_path: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", str(tmp_path / "no-such-model"), "-o", str(tmp_path / "out"), *words]
    assert main(argv) == code
    assert capsys.readouterr().err.startswith("optiq: ")


# --- given sensitivity files ---


def _table_file(ref: ModelRef, folder: Path, **options: Any) -> Path:
    table = measure_sensitivity(ref, MeasureOptions(method="static", **options))
    write_sensitivity(folder / "table.json", table)
    return folder / "table.json"


def _given(text: Path, file: Path, target: float, **measure: Any) -> ConvertOptions:
    return ConvertOptions(
        measure=quick_options(text, **measure), allocate=AllocateOptions(target_bpw=target),
        sensitivity=str(file), score=False, verify=False,
    )  # fmt: skip


def test_a_table_of_another_model(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    file = _table_file(save_tiny(tmp_path / "other", seed=9), tmp_path)
    with pytest.raises(errors.FingerprintMismatch, match="measure again with `optiq measure"):
        convert_model(ref, _given(text, file, 5.0), tmp_path / "out")


def _measured_with(ref: ModelRef, folder: Path, correction: str) -> Path:
    """A table as the fisher method would leave it; its values do not matter here."""
    file = _table_file(ref, folder)
    write_sensitivity(file, replace(read_sensitivity(file), method="fisher", correction=correction))
    return file


@pytest.mark.parametrize(("measured", "wanted"), [("full", "none"), ("none", "full"), ("fast", "full")])
def test_another_correction_than_the_tables(
    ref: ModelRef, text: Path, tmp_path: Path, measured: str, wanted: str
) -> None:
    file = _measured_with(ref, tmp_path, measured)
    options = _given(text, file, 5.0, correction=wanted)
    message = (
        f"was measured with --correction {measured}, not with --correction {wanted}: .* leave --correction"
    )
    with pytest.raises(errors.UsageError, match=message):
        convert_model(ref, options, tmp_path / "out", given=("sensitivity", "correction"))


def test_a_file_that_is_no_table(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"hello": 1}')
    with pytest.raises(errors.UsageError, match="sensitivity file"):
        convert_model(ref, _given(text, tmp_path / "table.json", 5.0), tmp_path / "out")


def test_the_budget_is_checked_against_the_given_tables_own_choices(
    ref: ModelRef, text: Path, tmp_path: Path
) -> None:
    """2g128 costs 2.25 bits where the default candidates start at 2.5: feasible with the file only."""
    file = _table_file(ref, tmp_path, candidate_bits="2,4", candidate_groups="128")
    with pytest.raises(AssertionError, match="a forward pass was started"):
        convert_model(ref, _given(text, file, 2.4), tmp_path / "out")
    only_eight = _table_file(ref, tmp_path, candidate_bits="8")
    with pytest.raises(errors.BudgetInfeasible):
        convert_model(ref, _given(text, only_eight, 5.0), tmp_path / "out")


def _publish(file: Path, ref: ModelRef, *, drop: int = 0, factor: int = 1, prefix: str = "") -> Path:
    """The published package's list of the model's tensors."""
    reference = open_reference(ref, MeasureOptions())
    units = reference.units((Choice(bits=4, group_size=64), Choice(bits=8, group_size=64)))
    layers = [
        {
            "layer_name": prefix + unit.path,
            "sensitivities": {"4": 0.01 * (n + 1), "8": 0.0001 * (n + 1)},
            "param_count": unit.numel * factor,
        }
        for n, unit in enumerate(units[drop:])
    ]
    file.write_text(json.dumps(layers))
    return file


def test_a_published_file_is_completed_from_the_model(ref: ModelRef, tmp_path: Path) -> None:
    reference = open_reference(ref, MeasureOptions())
    table = read_table(_publish(tmp_path / "sensitivity.json", ref, drop=2), reference)
    assert table.method == "published"
    assert len(table.units) == 15
    assert {probe.path for probe in table.probes} == {unit.path for unit in table.units}
    assert table.fixed_bits > 0
    assert table.total_numel > sum(unit.numel for unit in table.units)
    measured = [p.divergence for p in table.probes if p.exact and p.choice.bits == 4]
    guessed = [p.divergence for p in table.probes if not p.exact and p.choice.bits == 4]
    assert len(guessed) == 2
    assert min(measured) / 30 < min(guessed) <= max(guessed) < 30 * max(measured)


@pytest.mark.parametrize("changed", [{"factor": 2}, {"prefix": "other."}])
def test_a_published_file_of_another_model(
    ref: ModelRef, text: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    file = _publish(tmp_path / "sensitivity.json", ref, **changed)
    with pytest.raises(errors.FingerprintMismatch, match="belongs to another model"):
        convert_model(ref, _given(text, file, 5.0), tmp_path / "out")
