"""Measuring a tiny model: resumed, streamed, repeated, by every method."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx.utils import tree_flatten
from msgspec.structs import replace
from support_measure import forbid_forward, quick_options, save_tiny, write_calibration
from support_models import LLAMA, QWEN3_MOE, save_model_folder, tiny_model

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.measure.calibration import Windows
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant import sensitivity as sensitivity_module
from mlx_optiq_ext.quant.correct import pack, unpack
from mlx_optiq_ext.quant.errors_of import divergence_of_choices
from mlx_optiq_ext.quant.probe import Prober, Rounding
from mlx_optiq_ext.quant.reference import open_reference
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.progress import Progress
from mlx_optiq_ext.types.quant import SensitivityTable


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module", params=[LLAMA, QWEN3_MOE], ids=["dense", "experts"])
def ref(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "model", request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return save_tiny(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def table(ref: ModelRef, text: Path) -> SensitivityTable:
    return measure_sensitivity(ref, quick_options(text))


def _count_units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tensors whose errors were computed, counted in a list of one."""
    counted = [0]

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        return divergence_of_choices(*args, **kwargs)

    monkeypatch.setattr(sensitivity_module, "divergence_of_choices", counting)
    return counted


def _same_numbers(one: SensitivityTable, other: SensitivityTable) -> None:
    assert [(p.path, p.choice) for p in one.probes] == [(p.path, p.choice) for p in other.probes]
    for a, b in zip(one.probes, other.probes, strict=True):
        assert a.divergence == pytest.approx(b.divergence, rel=1e-5, abs=1e-12), a.path


def test_every_choice_of_every_unit_has_a_value_that_falls_with_the_bits(
    table: SensitivityTable,
) -> None:
    values = {(p.path, p.choice.bits): p for p in table.probes}
    for unit in table.units:
        own = [values[unit.path, choice.bits].divergence for choice in unit.choices]
        assert own == sorted(own, reverse=True), unit.path
        assert all(value >= 0 for value in own)
    assert all(len(probe.by_domain) == 2 for probe in table.probes)
    assert table.method == "fisher"
    assert table.correction == "fast"


def test_two_runs_are_equal(ref: ModelRef, text: Path, table: SensitivityTable) -> None:
    assert measure_sensitivity(ref, quick_options(text)) == table


def test_streaming_measures_the_same(ref: ModelRef, text: Path, table: SensitivityTable) -> None:
    streamed = measure_sensitivity(ref, quick_options(text, reference="stream"))
    assert streamed.reference == "stream"
    _same_numbers(streamed, table)


def test_a_stopped_measurement_goes_on_with_the_same_result(
    ref: ModelRef, text: Path, table: SensitivityTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every few units until it is done: no unit is computed twice."""
    counted = _count_units(monkeypatch)
    journal = tmp_path / "journal"
    stops = 0
    events: list[Progress] = []

    def stop_at_limit(progress: Progress) -> None:
        events.append(progress)
        if progress.stage == "measure" and counted[0] >= limit:
            raise KeyboardInterrupt

    for done_before_stop in (3, 8, 1000):
        limit = done_before_stop
        try:
            result = measure_sensitivity(
                ref, quick_options(text), journal_file=journal, progress=stop_at_limit
            )
        except KeyboardInterrupt:
            stops += 1
    assert stops == 2
    assert result == table
    total = sum(len(unit.paths) for unit in table.units)
    said = [event.note for event in events if event.note]
    assert [note.split(", from ")[0] for note in said] == [
        f"resuming: {done} of {total} tensors measured already" for done in (3, 8)
    ]
    assert max(event.replayed for event in events) == 8
    with_tied_head = [u for u in table.units if u.path != "model.embed_tokens"]
    assert counted[0] == len(with_tied_head)


def test_another_seed_is_measured_anew(
    dense: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    first = measure_sensitivity(dense, quick_options(text), journal_file=journal)
    counted = _count_units(monkeypatch)
    other = measure_sensitivity(dense, quick_options(text, seed=1), journal_file=journal)
    assert counted[0] == len(first.units) - 1
    assert other.probes != first.probes


def test_changed_weights_are_measured_anew(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    measure_sensitivity(save_tiny(tmp_path / "a", seed=0), quick_options(text), journal_file=journal)
    counted = _count_units(monkeypatch)
    measure_sensitivity(save_tiny(tmp_path / "b", seed=1), quick_options(text), journal_file=journal)
    assert counted[0] == 14


def test_a_finished_measurement_is_answered_without_a_forward_pass(
    dense: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    first = measure_sensitivity(dense, quick_options(text), journal_file=journal)
    forbid_forward(monkeypatch)
    assert measure_sensitivity(dense, quick_options(text), journal_file=journal) == first


@pytest.mark.parametrize("num_units", [1, 9])
def test_a_killed_process_is_continued(dense: ModelRef, text: Path, tmp_path: Path, num_units: int) -> None:
    """SIGKILL in the middle of measuring: the next run has the table of an undisturbed one."""
    journal = tmp_path / "journal"
    options = quick_options(text)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import msgspec\n"
        "from mlx_optiq_ext.blas import preload_blas\n"
        "preload_blas()\n"
        "from mlx_optiq_ext.quant.sensitivity import measure_sensitivity\n"
        "from mlx_optiq_ext.types.model import ModelRef\n"
        "from mlx_optiq_ext.types.options import MeasureOptions\n"
        "options = msgspec.json.decode(sys.argv[2], type=MeasureOptions)\n"
        "def die(progress):\n"
        "    if progress.stage == 'measure' and progress.done == int(sys.argv[4]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "ref = ModelRef(path=sys.argv[1], source='dense')\n"
        "measure_sensitivity(ref, options, journal_file=Path(sys.argv[3]), progress=die)\n"
    )
    words = [dense.path, msgspec.json.encode(options).decode(), str(journal), str(num_units)]
    done = subprocess.run([sys.executable, "-c", script, *words], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = sum(len(file.read_bytes().splitlines()) for file in tmp_path.glob("journal*")) - 1
    assert kept == num_units
    assert measure_sensitivity(dense, options, journal_file=journal) == measure_sensitivity(dense, options)


def test_static_runs_nothing(ref: ModelRef, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_forward(monkeypatch)
    table = measure_sensitivity(ref, MeasureOptions(method="static", calibration="no such file"))
    assert table.method == "static"
    assert table.reference == "none"
    assert table.correction == "none"
    assert {p.path for p in table.probes} == {u.path for u in table.units}
    assert all(p.divergence > 0 for p in table.probes)


def test_the_published_sweep_probes_everything_with_plain_rounding(dense: ModelRef, text: Path) -> None:
    table = measure_sensitivity(dense, quick_options(text, method="kl"))
    assert table.method == "kl"
    assert table.correction == "none"
    assert all(p.exact for p in table.probes)
    assert len(table.probes) == sum(len(u.choices) for u in table.units)
    by_bits = [sum(p.divergence for p in table.probes if p.choice.bits == bits) for bits in (2, 4, 8)]
    assert by_bits[0] > 4 * by_bits[1] > 16 * by_bits[2] > 0
    # Prefixes are cached, so a probe of the second of two blocks costs half: (14 + 28 …) / W at most.
    assert 0 < table.forward_equivalents < len(table.probes)


def test_the_sweep_refuses_a_streamed_model_before_it_runs(
    dense: ModelRef, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_forward(monkeypatch)
    with pytest.raises(UsageError, match="resident"):
        measure_sensitivity(dense, quick_options(text, method="kl", reference="stream"))


def test_probes_check_the_estimates_and_change_none(dense: ModelRef, text: Path) -> None:
    without = measure_sensitivity(dense, quick_options(text))
    probed = measure_sensitivity(dense, quick_options(text, probes=20))
    assert probed.probes == without.probes
    assert any("exact probes" in note for note in probed.notes)
    assert without.forward_equivalents < probed.forward_equivalents <= without.forward_equivalents + 20


def test_weights_are_as_before_after_probing(dense: ModelRef, text: Path) -> None:
    """A resident model is used again by the conversion: exact probes must leave no trace in it."""
    options = quick_options(text, probes=20)
    reference = open_reference(dense, options)
    measure_sensitivity(dense, options, reference=reference)
    fresh = open_reference(dense, options)
    for (name, a), (_, b) in zip(
        tree_flatten(reference.model.parameters()), tree_flatten(fresh.model.parameters()), strict=True
    ):
        assert bool(mx.array_equal(a, b)), name


def _checked_with(
    ref: ModelRef, options: MeasureOptions, monkeypatch: pytest.MonkeyPatch, journal: Path | None = None
) -> tuple[SensitivityTable, Tape, Rounding, Windows]:
    """The table, and what its estimates are checked with."""
    seen: list[tuple[Tape, Rounding, Windows]] = []

    def see(tape: Tape, rounding: Rounding, _: object, windows: Windows, *__: object) -> tuple[float, Any]:
        seen.append((tape, rounding, windows))
        return 0.0, ()

    monkeypatch.setattr(sensitivity_module, "check_estimates", see)
    table = measure_sensitivity(ref, options, journal_file=journal)
    return table, *seen[0]


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "apart"])
def test_probes_round_embedding_and_head_as_their_estimates_do(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_tied: bool
) -> None:
    config = {**LLAMA, "tie_word_embeddings": is_tied}
    ref = save_tiny(tmp_path / "model", config)
    options = quick_options(text, probes=4)
    table, tape, rounding, windows = _checked_with(ref, options, monkeypatch, tmp_path / "journal")
    hidden = tape.model.model(mx.array(windows.tokens)).astype(mx.float32)
    by_head = mx.mean(mx.square(hidden), axis=(0, 1))
    wanted = {"model.embed_tokens": by_head}
    if not is_tied:
        by_lookups = mx.array(table.column_importance["model.embed_tokens"])
        wanted = {"lm_head": by_head, "model.embed_tokens": by_lookups}
    outside = [unit for unit in table.units if unit.block is None]
    assert {unit.path for unit in outside} == set(wanted)
    for unit in outside:
        assert mx.allclose(rounding.importance[unit.path], wanted[unit.path], rtol=1e-4, atol=1e-7)
        weight = get_module(tape.model, unit.path).weight
        for choice in unit.choices[:2]:
            fitted = pack(
                weight, choice, level="fast", float_dtype=rounding.float_dtype,
                importance=rounding.importance[unit.path],
            )  # fmt: skip
            stored = rounding.apply(tape, unit, choice)[unit.path]
            assert mx.array_equal(stored, unpack(fitted, choice).astype(weight.dtype)), unit.path


def test_probes_of_a_continued_measurement_round_the_same(
    dense: ModelRef, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = quick_options(text, probes=4)
    _, _, first, _ = _checked_with(dense, options, monkeypatch, tmp_path / "journal")
    for finished in tmp_path.glob("*.table"):
        finished.unlink()
    counted = _count_units(monkeypatch)
    _, _, again, _ = _checked_with(dense, options, monkeypatch, tmp_path / "journal")
    assert counted[0] == 0
    assert first.importance.keys() == again.importance.keys()
    for path, values in first.importance.items():
        assert mx.array_equal(values, again.importance[path]), path


def test_an_exact_probe_of_the_head_is_its_estimate(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's estimate is taken on the logits: with one window per domain both see the same positions."""
    ref = save_tiny(tmp_path / "model", {**LLAMA, "tie_word_embeddings": False})
    options = quick_options(text, probes=4, num_tokens=64)
    table, tape, rounding, windows = _checked_with(ref, options, monkeypatch)
    assert len(windows.tokens) == len(table.domains) == 2
    (head,) = [unit for unit in table.units if unit.path == "lm_head"]
    estimates = {probe.choice: probe.divergence for probe in table.probes if probe.path == "lm_head"}
    prober = Prober(tape, range(2))
    for choice in head.choices[:2]:
        exact = prober.divergence(head, rounding.apply(tape, head, choice)).mean()
        # The probe casts what is stored to the model's type, the estimate does not.
        assert exact == pytest.approx(estimates[choice], rel=0.02), choice.label


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"calibration": "/no/such/file.jsonl"}, UsageError, "no/such"),
        ({"candidate_bits": "7"}, UsageError, "7"),
        ({"candidate_groups": "48"}, UsageError, "48"),
        ({"window": 8192, "num_tokens": 8192}, MeasurementError, "less than one window"),
    ],
)
def test_bad_options_are_refused_before_the_model_runs(
    dense: ModelRef,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    error: type,
    words: str,
) -> None:
    forbid_forward(monkeypatch)
    with pytest.raises(error, match=words):
        measure_sensitivity(dense, quick_options(changed.pop("calibration", text), **changed))


def test_non_finite_weights_are_named(text: Path, tmp_path: Path) -> None:
    model = tiny_model()
    model.layers[1].mlp.up_proj.weight[0, 0] = mx.inf
    save_model_folder(tmp_path / "m", model)
    ref = ModelRef(path=str(tmp_path / "m"), source="m")
    with pytest.raises(Exception, match="finite") as caught:
        measure_sensitivity(ref, quick_options(text))
    assert caught.value.exit_code in (3, 4)


def test_the_forward_pass_is_run_once(dense: ModelRef, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Tape.forward

    def counting(self: Tape, *args: Any) -> None:
        calls.append(1)
        original(self, *args)

    monkeypatch.setattr(Tape, "forward", counting)
    table = measure_sensitivity(dense, replace(quick_options(text), label_samples=2))
    assert len(calls) == 1
    assert table.forward_equivalents == 7.0
