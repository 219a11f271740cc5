"""The whole way on a real model: interrupted, resumed, converted, loaded by stock mlx-lm, compared."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_optiq_ext.convert.model import work_folder

pytestmark = pytest.mark.model

TARGET_BPW = 5.0
# Far fewer tokens, choices and probes than the defaults: this proves the way, benchmarks/ the quality.
SETTINGS = ("--target-bpw", str(TARGET_BPW), "--candidate-bits", "4,5,6", "--num-tokens", "256")
SETTINGS += ("--probes", "0", "--no-score")


def _optiq(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "mlx_optiq_ext", *map(str, words)]


def _interrupt_after(command: list[str], folder: Path, num_lines: int) -> list[bytes]:
    """Start ``command``, stop it as Ctrl-C would when so many lines are kept; return the lines."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    try:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if sum(file.read_bytes().count(b"\n") for file in folder.glob("journal.jsonl.*")) >= num_lines:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    assert process.wait(timeout=60) == 130
    (journal,) = folder.glob("journal.jsonl.*")
    return journal.read_bytes().splitlines()


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted by a command that was interrupted twice while it measured."""
    out = tmp_path_factory.mktemp("converted") / "smollm2-5.0bpw"
    command = _optiq("convert", smollm2, "-o", out, *SETTINGS)
    first = _interrupt_after(command, work_folder(out), 10)
    second = _interrupt_after(command, work_folder(out), len(first) + 8)
    assert second[: len(first)] == first
    measured = [json.loads(line)["path"] for line in second[1:]]
    assert len(measured) == len(set(measured)), "a tensor was measured a second time"
    assert not out.exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_only_the_finished_checkpoint_is_left(converted: Path) -> None:
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]


def test_stored_bits_are_within_a_fiftieth_below_the_target(converted: Path) -> None:
    nbytes = 0
    for shard in converted.glob("*.safetensors"):
        with shard.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        nbytes += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        )
    num_weights = 134_515_008  # SmolLM2-135M with its tied embedding counted once
    assert TARGET_BPW - 0.02 <= nbytes * 8 / num_weights <= TARGET_BPW


def test_bits_differ_between_tensors_and_every_entry_is_complete(converted: Path) -> None:
    quantization = json.loads((converted / "config.json").read_text())["quantization"]
    entries = [value for value in quantization.values() if isinstance(value, dict)]
    assert len(entries) == 211
    assert {entry["bits"] for entry in entries} >= {4, 6}
    assert all(set(entry) == {"bits", "group_size", "mode"} for entry in entries)


def test_stock_mlx_lm_loads_it_and_answers(converted: Path) -> None:
    script = (
        "import sys\n"
        "import mlx.core as mx\n"
        "from mlx_lm import generate, load\n"
        "model, tokenizer = load(sys.argv[1])\n"
        "model.set_dtype(mx.float32)  # the half-precision kernels are slow on CPUs\n"
        "messages = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
        "print(generate(model, tokenizer, prompt=prompt, max_tokens=16))\n"
        "print(sorted(name for name in sys.modules if name.startswith('mlx_optiq_ext.quant')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, converted],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "MLX_OPTIQ_DISABLE": "1"},
    )
    *answer, ours = done.stdout.strip().splitlines()
    assert "Paris" in " ".join(answer)
    assert ours == "[]"


def test_it_is_nearer_to_the_reference_than_uniform_4_bit_by_far(smollm2: Path, converted: Path) -> None:
    command = _optiq(
        "score", smollm2, converted, "--uniform", "4", "--num-tokens", "512", "--json", "--quiet"
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["role"]: row for row in json.loads(done.stdout)["rows"]}
    # At 5.0 bits against 4.5: a fifth with the defaults; half leaves room for the few tokens used here.
    assert 0 < rows["candidate"]["divergence"] < 0.5 * rows["uniform"]["divergence"]


def test_the_sensitivity_file_serves_another_budget(converted: Path) -> None:
    command = _optiq("allocate", converted, "--target-bpw", "5.5", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    allocation = json.loads(done.stdout)
    assert 5.4 < allocation["achieved_bpw"] <= 5.5
