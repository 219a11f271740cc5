"""``mlx_lm.lora --optiq-rank-scaling``: ranks per module in mlx-lm's own training; stock without it."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support_lora import TOKENS, quantized_model, table_for
from support_models import LLAMA, byte_tokenizer, quantize_by, tiny_model

import mlx_optiq_ext
from mlx_optiq_ext import _hook
from mlx_optiq_ext.errors import AdapterError, BudgetInfeasible, UsageError
from mlx_optiq_ext.formats.adapter import NATIVE_WEIGHTS_FILE, find_adapter
from mlx_optiq_ext.formats.sensitivity import write_sensitivity
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.files import load_adapter
from mlx_optiq_ext.lora.layers import adapted_modules, get_factors
from mlx_optiq_ext.lora.ranks import rank_by_bits
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.patches import registry
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import BitMap, Choice

V, DOWN = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"


def write_base(folder: Path) -> Path:
    """Two blocks in float32: one linear in 8 bits, one not quantized, the others in 3 bits."""
    model = tiny_model(dtype=mx.float32)
    choices = {t.path: Choice.parse("8g64" if t.path == DOWN else "3g64") for t in list_targets(model)}
    del choices[V]
    quantize_by(model, BitMap(choices=choices))
    folder.mkdir()
    writer = CheckpointWriter(folder)
    for name, array in tree_flatten(model.parameters()):
        writer.add(name, array)
    config = {**LLAMA, "torch_dtype": "float32"}
    writer.finish(config, BitMap(choices=choices), tokenizer=byte_tokenizer(320))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"number {k} and its square {k * k}"}) for k in range(16)]
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(stock_modules, monkeypatch, capsys, base, data, tmp_path):
    """``run(OUT, words…)`` → (exit code, stderr)."""

    def call(out, *words, model=base):
        command = [
            "mlx_lm.lora",
            "--train",
            "--model",
            model,
            "--data",
            data,
            "--adapter-path",
            tmp_path / out,
        ]
        command += ["--iters", 2, "--batch-size", 2, "--val-batches", 1, "--num-layers", 2, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            stock_modules["mlx_lm.lora"].main()
        except SystemExit as leaving:
            code = leaving.code
        return code, capsys.readouterr().err

    return call


def test_without_our_options_every_byte_is_stock(run, tmp_path):
    assert run("stock")[0] == 0
    stock = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    (tmp_path / "stock").rename(tmp_path / "before")
    mlx_optiq_ext.install()
    assert run("stock")[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()} == stock


def test_by_bits_trains_the_published_ranks_and_stores_both_forms(run, tmp_path, base):
    mlx_optiq_ext.install()
    code, said = run("out", "--optiq-rank-scaling", "by_bits")
    assert code == 0
    assert "mlx_lm.lora: ranks by_bits: 6 to 16 in 14 modules" in said
    assert "less quantization error" in said
    file = find_adapter(tmp_path / "out")
    plain = load_model(base)[0]
    expected = {
        t.path: rank_by_bits(t.choice, 8) for t in list_targets(plain) if t.path.startswith("model.layers")
    }
    assert file.config.ranks == expected
    assert (expected[DOWN], expected[V]) == (16, 8)
    assert file.form == "optiq"
    assert file.weights.endswith(NATIVE_WEIGHTS_FILE)
    assert file.config.rank_scaling == "by_bits"
    assert file.config.base == fingerprint(ModelRef(path=str(base), source=str(base)))
    document = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (document["iters"], document["optiq_rank_scaling"]) == (2, "by_bits")  # stock's own facts stay
    _hook.uninstall()
    from mlx_lm.tuner.utils import load_adapters

    ours, stock = load_model(base)[0], load_model(base)[0]
    load_adapter(ours, tmp_path / "out")
    load_adapters(stock, str(tmp_path / "out"))
    stock.eval()
    np.testing.assert_allclose(np.array(stock(TOKENS)), np.array(ours(TOKENS)), rtol=0, atol=2e-5)
    assert mx.abs(ours(TOKENS) - plain(TOKENS)).max().item() > 0  # it has learnt something
    assert {get_factors(layer).rank for layer in adapted_modules(stock).values()} == {16}


def test_by_sensitivity_reads_the_table_beside_the_weights_and_keeps_its_ceiling(run, tmp_path):
    base = write_base(tmp_path / "measured")
    targets = list_targets(load_model(base)[0])
    harm = {t.path: 0.001 for t in targets} | {"model.layers.0.self_attn.o_proj": 0.5}
    write_sensitivity(base / "optiq" / "sensitivity.json", table_for(targets, harm))
    mlx_optiq_ext.install()
    code, said = run("out", "--optiq-rank-scaling", "by_sensitivity", model=base)
    assert code == 0
    assert "ranks by_sensitivity" in said
    ranks = find_adapter(tmp_path / "out").config.ranks
    assert max(ranks, key=ranks.__getitem__) == "model.layers.0.self_attn.o_proj"
    costs = {t.path: t.parameters_per_rank for t in targets}
    assert sum(rank * costs[path] for path, rank in ranks.items()) <= 8 * sum(costs[path] for path in ranks)
    ceiling = 3 * sum(costs[path] for path in ranks)
    words = ("--optiq-rank-scaling", "by_sensitivity", "--optiq-max-parameters", ceiling)
    assert run("small", *words, model=base)[0] == 0
    smaller = find_adapter(tmp_path / "small").config.ranks
    assert sum(rank * costs[path] for path, rank in smaller.items()) <= ceiling
    words = ("--optiq-rank-scaling", "by_sensitivity", "--optiq-max-parameters", 10)
    code, said = run("none", *words, model=base)
    assert (code, "below rank 1 everywhere" in said) == (BudgetInfeasible.exit_code, True)


def test_a_training_goes_on_with_the_ranks_of_the_weights_it_resumes_from(run, tmp_path):
    mlx_optiq_ext.install()
    words = ("--optiq-rank-scaling", "by_bits")
    assert run("out", *words)[0] == 0
    native = tmp_path / "out" / NATIVE_WEIGHTS_FILE
    assert run("on", "--optiq-rank-scaling", "constant", "--resume-adapter-file", native)[0] == 0
    assert find_adapter(tmp_path / "on").config.ranks == find_adapter(tmp_path / "out").config.ranks


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--fine-tune-type", "dora", "--optiq-rank-scaling", "by_bits"), 2, "3, 5 and 6 bits"),
        (("--fine-tune-type", "full", "--optiq-rank-scaling", "by_bits"), 2, "--fine-tune-type full"),
        (("--optiq-max-parameters", 5000), 2, "--optiq-max-parameters needs --optiq-rank-scaling"),
        (("--optiq-rank-scaling", "by_sensitivity"), 2, "no sensitivity file of the base"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(run, words, code, says):
    mlx_optiq_ext.install()
    found, said = run("out", *words)
    assert found == code == UsageError.exit_code
    (line,) = [line for line in said.splitlines() if line.startswith("mlx_lm.lora: error:")]
    assert says in line
    assert "Traceback" not in said


def test_the_factory_takes_ranks_from_its_configuration(stock_modules):
    mlx_optiq_ext.install()
    factory = stock_modules["mlx_lm.tuner.utils"].linear_to_lora_layers
    model = quantized_model("4g64")
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    ranks = {"model.layers.1.self_attn.q_proj": 1, "model.layers.1.mlp.up_proj": 7}
    factory(model, 1, {**config, "optiq": {"ranks": ranks}})
    assert {path: get_factors(layer).rank for path, layer in adapted_modules(model).items()} == ranks
    assert not any(mx.any(get_factors(layer).b).item() for layer in adapted_modules(model).values())
    with pytest.raises(UsageError, match=r"lora_parameters\.optiq"):
        factory(quantized_model("4g64"), 1, {**config, "optiq": {"rank_scalings": "by_bits"}})
    with pytest.raises(AdapterError, match="has an adapter already"):
        factory(model, 1, {**config, "optiq": {"ranks": ranks}})


def test_both_seams_are_undone_to_the_identical_objects(stock_modules):
    utils, command = stock_modules["mlx_lm.tuner.utils"], stock_modules["mlx_lm.lora"]
    names = [(utils, "linear_to_lora_layers"), (command, "linear_to_lora_layers"), (command, "main")]
    names += [(command, "build_parser"), (command, "train_model")]
    before = [getattr(module, name) for module, name in names]
    mlx_optiq_ext.install()
    assert all(getattr(module, name) is not old for (module, name), old in zip(names, before, strict=True))
    states = {report.name: report.state for report in registry.report()}
    assert (states["lora-layers"], states["lora-command"]) == ("active", "active")
    _hook.uninstall()
    assert all(getattr(module, name) is old for (module, name), old in zip(names, before, strict=True))
