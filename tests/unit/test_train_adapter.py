"""A whole training: from names to an adapter on disk, stopped and resumed, refused and reported."""

import argparse
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace
from support_models import QWEN3_MOE, save_model_folder, tiny_model
from support_training import CHAT_TEMPLATE

from mlx_optiq_ext.cli.lora import train as command
from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import OutputExists, UsageError
from mlx_optiq_ext.formats.adapter import find_adapter
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.checkpoint import CHECKPOINT_FILE, Store, read_metrics
from mlx_optiq_ext.lora.files import load_adapter
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.loop import Trainer
from mlx_optiq_ext.lora.loss_curve import loss_scene
from mlx_optiq_ext.lora.objective import NotFinite
from mlx_optiq_ext.lora.prepare import TrainJob
from mlx_optiq_ext.lora.preview import preview_training
from mlx_optiq_ext.lora.sft import Imitation
from mlx_optiq_ext.lora.tokens import tokenize_dataset
from mlx_optiq_ext.lora.train import train_adapter
from mlx_optiq_ext.models.load import load_model
from mlx_optiq_ext.quant.exact import make_exact
from mlx_optiq_ext.stop import Stopped
from mlx_optiq_ext.types.adapter import AdapterOptions
from mlx_optiq_ext.types.progress import Progress
from mlx_optiq_ext.types.training import (
    CURVE_FILE,
    METRICS_FILE,
    TrainOptions,
    TrainRecord,
    ValidationRecord,
)

QUICK = TrainOptions(
    steps=6, batch_size=4, learning_rate=5e-3, validate_every=2, report_every=1, validation_share=0.25
)


@pytest.fixture
def base(tmp_path) -> Path:
    folder = save_model_folder(tmp_path / "base", tiny_model())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.fixture
def chats(tmp_path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {index} + 1?"},
                {"role": "assistant", "content": f"It is {index + 1}."},
            ]
        }
        for index in range(16)
    ]
    return _write(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def preferences(tmp_path) -> Path:
    rows = [
        {"prompt": f"Say {index}.", "chosen": f"Yes: {index}.", "rejected": f"no no {index}"}
        for index in range(16)
    ]
    return _write(tmp_path / "pairs.jsonl", rows)


def _write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _job(base: Path, data: Path, out: Path, options: TrainOptions = QUICK, **adapter: Any) -> TrainJob:
    chosen = AdapterOptions(rank=4, rank_scaling="constant", **adapter)
    return TrainJob(base=resolve_model(str(base)), data=str(data), out=out, options=options, adapter=chosen)


def test_adapter_loads_and_gives_the_loss_that_was_reported(base, chats, tmp_path) -> None:
    notes: list[str] = []
    job = _job(base, chats, tmp_path / "out")
    summary = train_adapter(job, on_note=notes.append)
    assert {entry.name for entry in job.out.iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
        METRICS_FILE,
        CURVE_FILE,
    }
    assert "4 of 16 examples are held out for validation" in notes
    assert any("padding" in note for note in notes)
    assert summary.validation.loss < summary.first_validation.loss
    config = find_adapter(job.out).config
    assert config.training.method == "sft"
    assert config.training.data == "chats.jsonl"
    assert config.training.validation_loss == summary.validation.loss
    assert config.training.settings["learning_rate"] == QUICK.learning_rate
    found = _validation_with(job, job.out)
    assert found == pytest.approx(summary.validation.loss, rel=1e-5)


def test_progress_carries_the_figures_of_every_update(base, chats, tmp_path) -> None:
    events: list[Progress] = []
    job = _job(base, chats, tmp_path / "out")
    train_adapter(job, progress=events.append)
    steps = [event for event in events if event.stage == "train"]
    assert [event.done for event in steps] == list(range(7))
    assert set(steps[0].values) == {"validation_loss", "validation_step"}
    records = read_metrics(job.out / METRICS_FILE)
    for record in records:
        values = steps[record.step].values
        if isinstance(record, TrainRecord):
            assert values["loss"] == pytest.approx(record.loss, rel=1e-6)
            assert values["learning_rate"] == record.learning_rate
            assert values["tokens_per_s"] == pytest.approx(record.tokens_per_s, rel=1e-6)
            assert values["peak_memory_nbytes"] > 0
        else:
            assert (values["validation_step"], values["validation_loss"]) == (record.step, record.loss)


def test_ranks_and_figures_are_json_lines_for_programs(base, chats, tmp_path, capsys) -> None:
    words = ["lora", "train", str(base), "--data", str(chats), "-o", str(tmp_path / "out"), "--steps", "2"]
    assert main([*words, "--json", "--progress-json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    ranks = next(line["ranks"] for line in lines if "ranks" in line)
    assert ranks == json.loads(out)["ranks"]["ranks"]
    last = [line for line in lines if line.get("stage") == "train"][-1]
    assert last["done"] == 2
    assert {"loss", "validation_loss", "learning_rate"} <= last["values"].keys()


def _validation_with(job: TrainJob, adapter: Path) -> float:
    """Validation loss of a stored adapter."""

    model, _ = load_model(job.base)
    make_exact(model, "")
    load_adapter(model, adapter)
    data = tokenize_dataset(job.data, job.base, job.options, lambda _: None)
    trainer = Trainer(
        model, Imitation(LogProbs(model)), (data.train, data.valid), job.options, Store(job.out, {})
    )
    sums = trainer.sums(data.valid)
    return sums.loss / sums.weight


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_stopped_training_ends_in_the_same_files(base, chats, preferences, tmp_path, method) -> None:
    options = replace(QUICK, method=method, dropout=0.2, save_every=2, accumulate=2, batch_size=2)
    data = chats if method == "sft" else preferences
    straight = _job(base, data, tmp_path / "straight", options)
    expected = train_adapter(straight)
    stopped = replace(straight, out=tmp_path / "stopped")
    with pytest.raises(Stopped) as caught:
        train_adapter(stopped, progress=_stop_at(4))
    assert "run the same command again" in caught.value.__notes__[0]
    assert {entry.name for entry in stopped.out.iterdir()} == {CHECKPOINT_FILE, METRICS_FILE}
    stages: list[str] = []
    found = train_adapter(stopped, progress=lambda event: stages.append(event.stage))
    assert "reference" not in stages  # what the base says is in the checkpoint
    assert found.validation == expected.validation
    assert found.kept_step == expected.kept_step
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (stopped.out / name).read_bytes() == (straight.out / name).read_bytes()
    assert _numbers(stopped.out) == _numbers(straight.out)


def _numbers(out: Path) -> list[tuple[Any, ...]]:
    return [
        (metric.step, metric.loss, metric.values)
        + ((metric.gradient_norm, metric.num_tokens) if isinstance(metric, TrainRecord) else ())
        for metric in read_metrics(out / METRICS_FILE)
    ]


def _stop_at(step: int) -> Any:
    def sink(event: Any) -> None:
        if event.stage == "train" and event.done == step:
            raise Stopped(signal.SIGTERM)

    return sink


def test_other_settings_do_not_continue_a_stopped_training(base, chats, tmp_path) -> None:
    job = _job(base, chats, tmp_path / "out")
    with pytest.raises(Stopped):
        train_adapter(job, progress=_stop_at(3))
    other = replace(job, options=replace(QUICK, learning_rate=1e-3))
    with pytest.raises(UsageError, match=r"other settings \(--learning-rate\)"):
        train_adapter(other)
    summary = train_adapter(replace(other, options=replace(other.options, resume=False)))
    assert summary.steps == 6
    assert [m.step for m in read_metrics(job.out / METRICS_FILE) if isinstance(m, ValidationRecord)] == [
        0, 2, 4, 6,
    ]  # fmt: skip


def test_finished_output_is_not_replaced(base, chats, tmp_path) -> None:
    job = _job(base, chats, tmp_path / "out", replace(QUICK, steps=1))
    train_adapter(job)
    with pytest.raises(OutputExists, match="no unfinished training"):
        train_adapter(job)


def test_preferences_are_learnt_and_reported(base, preferences, tmp_path) -> None:
    options = replace(QUICK, method="dpo", steps=12, learning_rate=1e-2, validate_every=4)
    summary = train_adapter(_job(base, preferences, tmp_path / "out", options))
    before, after = summary.first_validation, summary.validation
    assert before.loss == pytest.approx(np.log(2), abs=1e-3)
    assert before.values["margin"] == pytest.approx(0, abs=1e-3)
    assert after.values["margin"] > 0.2
    assert after.values["accuracy"] == 1.0
    assert find_adapter(tmp_path / "out").config.training.method == "dpo"


def test_experts_are_trained(tmp_path, chats) -> None:
    folder = save_model_folder(tmp_path / "moe", tiny_model(QWEN3_MOE), QWEN3_MOE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    summary = train_adapter(_job(folder, chats, tmp_path / "out", replace(QUICK, grad_checkpoint=True)))
    assert summary.validation.loss < summary.first_validation.loss
    assert any("switch_mlp" in path for path in find_adapter(tmp_path / "out").config.ranks)


def test_last_good_adapter_is_written_when_a_loss_is_no_number(base, chats, tmp_path, monkeypatch) -> None:

    original, calls = Imitation.sums, []

    def poisoned(self: Imitation, batch: Any) -> Any:
        calls.append(1)
        loss, values = original(self, batch)
        return (loss * mx.array(float("nan")) if len(calls) > 6 else loss), values

    monkeypatch.setattr(Imitation, "sums", poisoned)
    job = _job(base, chats, tmp_path / "out")
    with pytest.raises(NotFinite, match=r"chats\.jsonl, line \d+.*The adapter of update \d is in"):
        train_adapter(job)
    model, _ = load_model(job.base)
    assert load_adapter(model, job.out).training.steps > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (replace(QUICK, method="dpo", train_on="all"), "--train-on all is for sft"),
        (replace(QUICK, label_smoothing=0.1), "--label-smoothing belongs to"),
        (replace(QUICK, method="dpo", dpo_loss="ipo", label_smoothing=0.1), "--label-smoothing belongs to"),
    ],
)
def test_options_that_exclude_each_other_are_refused(base, chats, tmp_path, options, said) -> None:
    with pytest.raises(UsageError, match=said):
        train_adapter(_job(base, chats, tmp_path / "out", options))
    assert not (tmp_path / "out").exists()


def test_start_from_the_error_needs_the_original(base, chats, tmp_path) -> None:
    with pytest.raises(UsageError, match="--original"):
        train_adapter(_job(base, chats, tmp_path / "out", init="error"))


def test_an_original_that_nothing_needs_is_refused(base, chats, tmp_path) -> None:
    with pytest.raises(UsageError, match="--original is for --init error"):
        train_adapter(_job(base, chats, tmp_path / "out", original=str(base)))


def test_command_prints_ranks_then_one_document(base, chats, tmp_path, capsys) -> None:
    _write(tmp_path / "test.jsonl", [])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    words = [str(base), "--data", str(chats), "-o", str(tmp_path / "out"), "--json", "--steps", "2"]
    assert command.run(parser.parse_args([*words, "--rank-scaling", "constant"])) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["summary"]["steps"] == 2
    assert document["ranks"]["scaling"] == "constant"
    assert document["adapter"] == str(tmp_path / "out")
    assert "Ranks by module" in printed.err
    assert printed.err.index("Ranks by module") < printed.err.index("train ")
    assert "note: 1 of 16 examples are held out for validation" in printed.err


def test_dry_run_checks_counts_and_writes_nothing(base, chats, tmp_path, capsys) -> None:
    words = ["lora", "train", str(base), "--data", str(chats), "-o", str(tmp_path / "out")]
    options = ["--batch-size", "4", "--accumulate", "2", "--epochs", "3", "--validation-share", "0.25"]
    assert main([*words, *options, "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    preview = found["preview"]
    assert (preview["train"]["examples"], preview["valid"]["examples"]) == (12, 4)
    shown = preview["samples"][0]["pieces"]
    assert len(preview["samples"]) == 3
    assert [piece["is_learnt"] for piece in shown] == [False, True, False]
    assert shown[0]["text"].startswith("<user>")
    assert shown[0]["text"].endswith("<assistant>")
    assert shown[1]["text"].endswith("</s>")
    assert preview["test"] == {"examples": 0, "tokens": 0, "learnt_tokens": 0, "longest": 0}
    assert (preview["updates_per_epoch"], preview["updates"], preview["done_updates"]) == (2, 6, 0)
    job = _job(base, chats, tmp_path / "other", replace(QUICK, steps=3, epochs=1))
    assert train_adapter(job).num_tokens == preview["train"]["tokens"]  # 3 updates of 4: every example once
    assert sum(found["ranks"]["ranks"].values()) > 0
    assert "4 of 16 examples are held out for validation" in found["notes"]
    assert "Ranks by module" in printed.err
    assert not (tmp_path / "out").exists()


def test_dry_run_of_a_stopped_training_says_where_it_would_go_on(base, chats, tmp_path) -> None:
    job = _job(base, chats, tmp_path / "out")
    with pytest.raises(Stopped):
        train_adapter(job, progress=_stop_at(4))
    kept = {file.name: file.read_bytes() for file in job.out.iterdir()}
    notes: list[str] = []
    assert preview_training(job, on_note=notes.append).done_updates == 3
    assert notes[-1].startswith("would go on after update 3")
    assert {file.name: file.read_bytes() for file in job.out.iterdir()} == kept
    with pytest.raises(UsageError, match="other settings"):
        preview_training(replace(job, options=replace(QUICK, beta=0.2)))


def test_dry_run_refuses_what_the_training_would(base, chats, tmp_path, capsys) -> None:
    (tmp_path / "bad.jsonl").write_text(chats.read_text() + '{"messages": []}\n')
    data = tmp_path / "bad.jsonl"
    words = ["lora", "train", str(base), "--data", str(data), "-o", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 2
    assert "bad.jsonl, line 17" in capsys.readouterr().err


def test_dry_run_shows_a_table(base, preferences, tmp_path, capsys) -> None:
    words = ["lora", "train", str(base), "--data", str(preferences), "-o", str(tmp_path / "out")]
    assert main([*words, "--method", "dpo", "--dry-run", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "examples", "tokens", "learnt", "longest"]
    assert lines[2].split()[:2] == ["training", "15"]
    assert lines[-1].startswith("4 updates, 4 an epoch; ")
    assert lines[-1].endswith("parameters. Nothing was trained.")


def test_command_shows_a_table(base, chats, tmp_path, capsys) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [str(base), "--data", str(chats), "-o", str(tmp_path / "out"), "--steps", "2"]
    namespace = parser.parse_args(words)
    namespace.quiet = True
    assert command.run(namespace) == 0
    printed = capsys.readouterr()
    assert "Ranks by module" not in printed.err
    lines = printed.out.splitlines()
    assert any(line.startswith("validation loss") and "before" in line for line in lines)
    assert any(line.startswith("adapter") and "parameters" in line for line in lines)


def test_curve_is_a_picture_of_all_that_was_recorded(base, chats, tmp_path) -> None:
    job = _job(base, chats, tmp_path / "out")
    train_adapter(job)
    root = ElementTree.fromstring((job.out / CURVE_FILE).read_text())
    tag = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{tag}svg"
    metrics = read_metrics(job.out / METRICS_FILE)
    lines = root.findall(f".//{tag}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [
        sum(isinstance(metric, kind) for metric in metrics) for kind in (TrainRecord, ValidationRecord)
    ]
    assert "Loss in nats per learnt token" in "".join(root.itertext())
    assert loss_scene([], "nothing", "nats") is None


def test_terminated_process_goes_on_to_the_same_adapter(base, chats, tmp_path) -> None:
    def command_line(out: str) -> list[str]:
        words = [str(base), "--data", str(chats), "-o", str(tmp_path / out), "--rank-scaling", "constant"]
        settings = ["--steps", "30", "--batch-size", "4", "--report-every", "1", "--validate-every", "10"]
        return [
            sys.executable,
            "-m",
            "mlx_optiq_ext",
            "lora",
            "train",
            *words,
            *settings,
            "--json",
            "--quiet",
        ]

    with subprocess.Popen(command_line("out"), stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "out" / METRICS_FILE
        deadline = time.monotonic() + 60
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 4):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "a checkpoint of update" in said
    for out in ("out", "straight"):
        subprocess.run(command_line(out), check=True, capture_output=True, timeout=120)
    stopped, straight = (
        (tmp_path / out / "adapters.safetensors").read_bytes() for out in ("out", "straight")
    )
    assert stopped == straight
