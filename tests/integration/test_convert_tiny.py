"""Whole conversions of tiny models: budgets, interruptions, given tables, what is shown."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from support_measure import forbid_forward, quick_options, save_tiny, write_calibration
from support_models import LLAMA, QWEN3_MOE

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.convert.model import convert_model, work_folder
from mlx_optiq_ext.formats.allocation import write_allocation
from mlx_optiq_ext.formats.metadata import read_metadata
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.progress import Progress
from mlx_optiq_ext.types.quant import BitMap, Choice

# Its smallest tensor is 0.9 % of all weights: from 6 to 8 bits it moves the whole by 0.018.
FINE = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(REPOSITORY / part) for part in ("", "integrations", "tui")),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "fine", FINE)


@pytest.fixture(scope="module")
def fine_table(fine: ModelRef, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("table") / "sensitivity.json"
    options = quick_options(text, candidate_bits="2,3,4,5,6,8", correction="none")
    write_sensitivity(file, measure_sensitivity(fine, options))
    return file


def _options(
    text: Path, target: float = 5.0, *, measure: dict[str, Any] | None = None, **rest: Any
) -> ConvertOptions:
    settings = {"score": False, "verify": False, **rest}
    return ConvertOptions(
        measure=quick_options(text, **(measure or {})),
        allocate=AllocateOptions(target_bpw=target),
        **settings,
    )


def _num_weights(ref: ModelRef) -> int:
    """Weights of an unquantized folder: half of its bfloat16 bytes."""
    return sum(tensor.nbytes for tensor in read_folder(Path(ref.path)).values()) // 2


def _stored_bpw(out: Path, ref: ModelRef) -> float:
    return 8 * sum(tensor.nbytes for tensor in read_folder(out).values()) / _num_weights(ref)


# --- budgets ---


@pytest.mark.parametrize("target", [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0])
def test_bytes_on_disk_are_within_a_fiftieth_of_a_bit_below_the_target(
    fine: ModelRef, fine_table: Path, text: Path, tmp_path: Path, target: float
) -> None:
    options = _options(text, target, measure={"correction": "none"}, sensitivity=str(fine_table))
    convert_model(fine, options, tmp_path / "out")
    assert target - 0.02 <= _stored_bpw(tmp_path / "out", fine) <= target


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("correction", ["none", "fast", "full"])
def test_every_correction_is_written_verified_and_within_the_budget(
    text: Path, tmp_path: Path, config: dict[str, Any], correction: str
) -> None:
    ref = save_tiny(tmp_path / "model", config)
    result = convert_model(
        ref, _options(text, measure={"correction": correction}, verify=True), tmp_path / "out"
    )
    assert result.verification is not None
    assert result.verification.problems == ()
    assert _stored_bpw(tmp_path / "out", ref) <= 5.0
    assert read_metadata(tmp_path / "out").allocation.correction == correction
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["model", "out"]


def test_streaming_writes_the_same_bytes(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    for how in ("resident", "stream"):
        convert_model(ref, _options(text, measure={"reference": how}), tmp_path / how)
    one, other = read_folder(tmp_path / "resident"), read_folder(tmp_path / "stream")
    assert one.keys() == other.keys()
    resident, stream = ((tmp_path / how / "model.safetensors").read_bytes() for how in ("resident", "stream"))
    assert resident == stream


def test_two_conversions_are_equal(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert_model(ref, _options(text), tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


# --- given tables, other methods ---


def test_a_given_table_is_retargeted_without_measuring(
    fine: ModelRef, fine_table: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlx_optiq_ext.convert.model.measure_sensitivity", lambda *_, **__: pytest.fail("measured")
    )
    monkeypatch.setattr("mlx_optiq_ext.models.tape.Tape.forward", lambda *_, **__: pytest.fail("ran"))
    for target in (4.0, 6.0):
        out = tmp_path / str(target)
        options = _options(text, target, measure={"correction": "none"}, sensitivity=str(fine_table))
        convert_model(fine, options, out)
        assert _stored_bpw(out, fine) == pytest.approx(target, abs=0.02)
        assert read_sensitivity(out).probes == read_sensitivity(fine_table).probes


def test_a_bit_map_of_allocate_is_converted_to_the_same_bytes(
    fine: ModelRef, fine_table: Path, text: Path, tmp_path: Path
) -> None:
    words = ["--target-bpw", "5", "--pin", "*.0.*=6"]
    assert main(["allocate", str(fine_table), *words, "-o", str(tmp_path / "map.json"), "--json"]) == 0
    common = ["convert", fine.path, "--sensitivity", str(fine_table), "--calibration", str(text)]
    common += ["--num-tokens", "256", "--window", "32", "--correction", "none", "--no-score", "--json"]
    assert main([*common, *words, "-o", str(tmp_path / "chosen")]) == 0
    given = ["--allocation", str(tmp_path / "map.json")]
    assert main([*common, *given, "-o", str(tmp_path / "given")]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "chosen" / name).read_bytes()
    chosen, priced = (read_metadata(tmp_path / name).allocation for name in ("chosen", "given"))
    assert priced.budget == "--allocation map.json"
    assert priced.pins == chosen.pins
    assert priced.predicted_divergence == chosen.predicted_divergence
    command = read_metadata(tmp_path / "given").command
    assert "--allocation" in command
    assert "--target-bpw" not in command


def test_an_edited_bit_map_is_what_is_written_and_counted(
    fine: ModelRef, fine_table: Path, text: Path, tmp_path: Path
) -> None:
    table = read_sensitivity(fine_table)
    path = "model.layers.3.mlp.down_proj"
    made = allocate(table, AllocateOptions(target_bpw=5.0, pin=(f"{path}=3",)))
    edited = dict(made.bit_map.choices) | {path: Choice.parse("8")}
    write_allocation(tmp_path / "map.json", replace(made, bit_map=BitMap(choices=edited)))
    options = ConvertOptions(
        measure=quick_options(text, correction="none"), sensitivity=str(fine_table), score=False,
        allocation=str(tmp_path / "map.json"),
    )  # fmt: skip
    result = convert_model(fine, options, tmp_path / "out")
    assert result.verification is not None
    assert result.verification.problems == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"][path]["bits"] == 8
    assert result.allocation.pins == ()
    assert result.allocation.achieved_bpw > made.achieved_bpw
    assert _stored_bpw(tmp_path / "out", fine) == pytest.approx(result.allocation.achieved_bpw, abs=1e-3)


def test_a_published_file_is_converted_by(
    fine: ModelRef, text: Path, tmp_path: Path, fine_table: Path
) -> None:
    layers = [
        {
            "layer_name": unit.path,
            "sensitivities": {"4": 1e-3, "8": 1e-5},
            "param_count": unit.numel,
            "metadata": {"shape": list(unit.shape)},
        }
        for unit in read_sensitivity(fine_table).units
    ]
    (tmp_path / "sensitivity.json").write_text(json.dumps(layers))
    options = _options(
        text, 6.0, measure={"correction": "none"}, sensitivity=str(tmp_path / "sensitivity.json"), verify=True
    )
    result = convert_model(fine, options, tmp_path / "out")
    assert {choice.bits for choice in result.allocation.bit_map.choices.values()} == {4, 8}
    assert _stored_bpw(tmp_path / "out", fine) <= 6.0


def test_the_static_method_converts_without_a_forward_pass(
    ref: ModelRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_optiq_ext.models.tape.Tape.__init__", lambda *_, **__: pytest.fail("ran"))
    options = ConvertOptions(
        measure=MeasureOptions(method="static"), allocate=AllocateOptions(target_bpw=5.0), score=False
    )
    result = convert_model(ref, options, tmp_path / "out")
    assert result.verification is not None
    assert result.allocation.correction == "none"
    assert 4.9 < _stored_bpw(tmp_path / "out", ref) <= 5.0


def test_the_published_sweep_converts(ref: ModelRef, text: Path, tmp_path: Path) -> None:
    options = _options(text, measure={"method": "kl", "candidate_bits": "4,8"})
    result = convert_model(ref, options, tmp_path / "out")
    assert _stored_bpw(tmp_path / "out", ref) <= 5.0
    assert read_sensitivity(tmp_path / "out").method == "kl"
    assert any("measured with correction none, written with fast" in note for note in result.notes)


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("float32", "F32")])
def test_another_type_is_stored_counted_and_verified(
    ref: ModelRef, text: Path, tmp_path: Path, dtype: str, name: str
) -> None:
    result = convert_model(ref, _options(text, 5.5, dtype=dtype, verify=True), tmp_path / "out")
    tensors = read_folder(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {"U32", name}
    assert _stored_bpw(tmp_path / "out", ref) == pytest.approx(result.allocation.achieved_bpw, abs=1e-4)


# --- interruptions ---


def test_an_error_while_writing_leaves_nothing_and_is_continued_without_measuring(
    ref: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        original, written = CheckpointWriter.add, []

        def fail_later(self: CheckpointWriter, name: str, array: Any) -> None:
            written.append(name)
            if len(written) == 20:
                raise RuntimeError("power cut")
            original(self, name, array)

        patch.setattr(CheckpointWriter, "add", fail_later)
        with pytest.raises(RuntimeError, match="power cut"):
            convert_model(ref, _options(text), out)
    assert [entry.name for entry in tmp_path.iterdir()] == [work_folder(out).name]
    monkeypatch.setattr(
        "mlx_optiq_ext.models.tape.Tape.forward", lambda *_, **__: pytest.fail("measured again")
    )
    convert_model(ref, _options(text), out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("stage", ["measure", "write"])
def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_goes_on(
    ref: ModelRef, text: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "out"
    options = _options(text)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import msgspec\n"
        "from mlx_optiq_ext.blas import preload_blas\n"
        "preload_blas()\n"
        "from mlx_optiq_ext.convert.model import convert_model\n"
        "from mlx_optiq_ext.types.model import ModelRef\n"
        "from mlx_optiq_ext.types.options import ConvertOptions\n"
        "def die(progress):\n"
        "    if progress.stage == sys.argv[4]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = msgspec.json.decode(sys.argv[2], type=ConvertOptions)\n"
        "ref = ModelRef(path=sys.argv[1], source='model')\n"
        "convert_model(ref, options, Path(sys.argv[3]), progress=die)\n"
    )
    words = [ref.path, msgspec.json.encode(options).decode(), str(out), stage]
    done = subprocess.run([sys.executable, "-c", script, *words], env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert all(entry.name.startswith(".out.") for entry in tmp_path.iterdir())
    assert not list(tmp_path.rglob("config.json"))

    seen: list[Progress] = []
    convert_model(ref, options, out, progress=seen.append)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert any(p.stage == "measure" and p.replayed < p.done for p in seen) == (stage == "measure")
    undisturbed = tmp_path / "undisturbed"
    convert_model(ref, options, undisturbed)
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


# --- the command line ---


@pytest.fixture
def words(ref: ModelRef, text: Path, tmp_path: Path) -> list[str]:
    return [
        "convert", ref.path, "-o", str(tmp_path / "out dir"), "--target-bpw", "5.0",
        "--candidate-bits", "4,6,8", "--calibration", str(text), "--num-tokens", "128", "--window", "32",
        "--probes", "0", "--correction", "fast", "--quiet",
    ]  # fmt: skip


def test_people_see_what_was_chosen_how_it_compares_and_what_is_next(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    shown = capsys.readouterr()
    out = str(tmp_path / "out dir")
    for expected in (
        "Bits chosen", "share of weights", "Held-out comparison", "uniform 4g64", "95 % interval",
        "Verified: 15 modules", "without this package", "of weights in ", f"Written to {out}",
        "mlx_lm.generate", f"optiq report '{out}'",
    ):  # fmt: skip
        assert expected in shown.out, expected
    assert "Token indices sequence length" not in shown.err
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err


def test_json_is_one_document(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json", "--no-score", "--no-verify"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["allocation"]["achieved_bpw"] <= 5.0
    assert document["peak_nbytes"] > 0


def test_measure_shows_where_the_domains_disagree_most(
    ref: ModelRef, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    argv = ["measure", ref.path, "-o", str(out), "--calibration", str(text), "--num-tokens", "128"]
    assert main([*argv, "--window", "32", "--candidate-bits", "4,8", "--correction", "none", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "costliest at 4g64" in shown
    assert "least agreement: prose and code, " in shown
    assert "furthest from the others: " in shown
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_measure_that_was_stopped_goes_on(
    ref: ModelRef,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "table.json"
    argv = ["measure", ref.path, "-o", str(out), "--calibration", str(text), "--num-tokens", "128"]
    argv += ["--window", "32", "--candidate-bits", "4,8", "--correction", "none", "--probes", "0", "--quiet"]
    with monkeypatch.context() as patch:

        def disk_full(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("mlx_optiq_ext.cli.commands.measure.write_sensitivity", disk_full)
        assert main(argv) == 130
    assert "run the same command again" in capsys.readouterr().err
    forbid_forward(monkeypatch)
    assert main(argv) == 0
    assert out.is_file()
