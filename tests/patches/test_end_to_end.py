"""Every spelling of the stock command writes the same checkpoint, and stock mlx-lm alone loads it."""

import json

import pytest

# Small, and exact: the point here is the way into the pipeline, not the measurement.
QUICK = {"optiq_target_bpw": 5.5, "optiq_num_tokens": 64, "optiq_window": 16, "optiq_probes": 0}
FLAGS = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))]
LOAD = (
    "import sys, mlx.core as mx, mlx_lm\n"
    "model, tokenizer = mlx_lm.load(sys.argv[1])\n"
    "print(model(mx.array([[1, 2, 3]])).shape)\n"
)


@pytest.fixture(scope="module")
def outputs(hooked, console_script, tiny_llama, tmp_path_factory):
    """Spelling → the folder it wrote."""
    folder = tmp_path_factory.mktemp("converted")
    spellings = {
        "script": [console_script],
        "one script": [console_script.with_name("mlx_lm"), "convert"],
        "package": ["-m", "mlx_lm", "convert"],
        "module": ["-m", "mlx_lm.convert"],
        "isolated": ["-Im", "mlx_lm.convert"],
    }
    written = {}
    for name, words in spellings.items():
        written[name] = folder / name.replace(" ", "-")
        stock = ["--hf-path", tiny_llama, "--mlx-path", written[name], "--quant-predicate", "optiq"]
        done = hooked.run(*words, *stock, *FLAGS, "--no-optiq-score", "--no-optiq-verify", cwd=folder)
        assert done.returncode == 0, done.stderr
    written["call"] = folder / "call"
    keywords = QUICK | {"optiq_score": False, "optiq_verify": False}
    places = (str(tiny_llama), str(written["call"]))
    code = f"import mlx_lm; mlx_lm.convert(*{places}, quant_predicate='optiq', **{keywords})"
    done = hooked.run("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return written


def test_all_spellings_choose_the_same_bits(outputs):
    configs = [json.loads((out / "config.json").read_text())["quantization"] for out in outputs.values()]
    assert all(config == configs[0] for config in configs)
    bits = {entry["bits"] for entry in configs[0].values() if isinstance(entry, dict)}
    assert len(bits) > 1, "mixed precision was asked for"


def test_the_target_is_a_ceiling_on_the_bytes_written(outputs, tiny_llama):
    # float16 source: its bytes are 16 bits per weight.
    source = (tiny_llama / "model.safetensors").stat().st_size
    for out in outputs.values():
        nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        # Headers of a tiny model weigh as much as its weights' bits differ: 8 kB of slack.
        assert nbytes <= source * QUICK["optiq_target_bpw"] / 16 + 8192


def test_stock_mlx_lm_loads_every_output(bare, outputs, tmp_path):
    for out in outputs.values():
        done = bare.run("-c", LOAD, out, cwd=tmp_path)
        assert done.stdout == "(1, 3, 320)\n", done.stderr


def test_the_default_conversion_verifies_and_scores_itself(hooked, bare, tiny_llama, tmp_path):
    words = [
        "-m",
        "mlx_lm",
        "convert",
        "--hf-path",
        tiny_llama,
        "--quant-predicate",
        "optiq",
        "--q-bits",
        "4",
    ]
    done = hooked.run(*words, *FLAGS[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[INFO] Wrote mlx_model with 4." in done.stdout
    assert bare.run("-c", LOAD, "mlx_model", cwd=tmp_path).stdout == "(1, 3, 320)\n"
