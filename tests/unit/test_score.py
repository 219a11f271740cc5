import itertools
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as stock_load
from mlx_lm.utils import quantize_model
from support_models import LLAMA, QWEN3_MOE, quantize_by, save_model_folder, tiny_model

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import FingerprintMismatch, UsageError
from mlx_optiq_ext.eval import logits as logits_module
from mlx_optiq_ext.eval.logits import LogitCache, window_logits
from mlx_optiq_ext.eval.prepare import load_uniform
from mlx_optiq_ext.eval.score import HeldOutScorer, parse_uniform, score
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.formats.score import read_score
from mlx_optiq_ext.quant.exact import make_exact, parameter_nbytes, unpack_weights
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ScoreOptions
from mlx_optiq_ext.types.progress import Progress
from mlx_optiq_ext.types.quant import BitMap, Choice

DOMAINS = ("prose", "code")


def ref(folder: Path) -> ModelRef:
    return ModelRef(path=str(folder), source=str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and a mixture reference, and a mixed-precision checkpoint of the dense one."""
    root = tmp_path_factory.mktemp("score")
    mixed = tiny_model()
    paths = [path for path, module in mixed.named_modules() if hasattr(module, "to_quantized")]
    plan = BitMap(
        choices={p: Choice(bits=4 + 2 * (i % 2), group_size=64) for i, p in enumerate(sorted(paths))}
    )
    quantize_by(mixed, plan)
    return {
        "dense": save_model_folder(root / "dense", tiny_model()),
        "moe": save_model_folder(root / "moe", tiny_model(QWEN3_MOE), QWEN3_MOE),
        "mixed": save_model_folder(root / "mixed", mixed, LLAMA, plan),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(5)
    lines = [
        json.dumps({"domain": domain, "text": "".join(chr(c) for c in rng.integers(97, 123, 70))})
        for _ in range(4)
        for domain in DOMAINS
    ]
    path = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def options(text: str, uniform: str = "") -> ScoreOptions:
    return ScoreOptions(held_out=text, num_tokens=256, window=32, uniform=uniform)


def test_more_bits_diverge_less_and_a_copy_does_not_at_all(folders: dict[str, Path], text: str) -> None:
    events: list[Progress] = []
    report = score(
        ref(folders["dense"]),
        [ref(folders["dense"])],
        options(text, "2,3,4,5,6,8,keep"),
        events.append,
        labels=["copy"],
    )
    assert [row.label for row in report.rows] == [
        "reference",
        "copy",
        *(f"uniform {b}g64" for b in (2, 3, 4, 5, 6, 8)),
        "uniform keep",
    ]
    divergences = [row.divergence for row in report.rows]
    assert divergences[0] == 0.0
    assert divergences[1] < 1e-6
    assert divergences[8] < 1e-6
    assert all(wide < 0.6 * narrow for narrow, wide in itertools.pairwise(divergences[2:8]))
    assert [row.top1 for row in report.rows[:2]] == [1.0, 1.0]
    assert all(row.divergence_stderr > 0 for row in report.rows[2:8])
    # 8 windows of 2 domains leave 6 degrees of freedom.
    for row in report.rows[2:8]:
        assert row.divergence_half_width == pytest.approx(2.446912 * row.divergence_stderr)
        assert row.top1_half_width == pytest.approx(2.446912 * row.top1_stderr)
    assert {tuple(row.by_domain) for row in report.rows} == {DOMAINS}
    for row in report.rows:
        assert np.mean(list(row.by_domain.values())) == pytest.approx(row.divergence, rel=1e-6)
    assert (events[-1].done, events[-1].total) == (8 * 9, 8 * 9)


def test_bits_are_those_on_disk(folders: dict[str, Path], text: str) -> None:
    report = score(ref(folders["dense"]), [ref(folders["mixed"])], options(text, "4"))
    numel = sum(array.size for _, array in tree_flatten(tiny_model().parameters()))
    on_disk = sum(tensor.nbytes for tensor in read_folder(folders["mixed"]).values())
    reference, mixed, uniform = report.rows
    assert (mixed.nbytes, mixed.bpw) == (on_disk, 8 * on_disk / numel)
    assert reference.bpw == 16.0
    assert 4.5 < uniform.bpw < 4.6
    assert mixed.role == "candidate"
    assert uniform.role == "uniform"
    assert mixed.against_first is None
    assert uniform.against_first == pytest.approx(uniform.divergence / mixed.divergence)
    low, high = uniform.against_first_interval or (0, 0)
    assert low < uniform.against_first < high


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("choice", ["4", "6g32", "mxfp4"])
def test_uniform_is_what_stock_conversion_makes(folders: dict[str, Path], name: str, choice: str) -> None:
    wanted = Choice.parse(choice)
    stock, config = stock_load(folders[name])
    stock, _ = quantize_model(stock, config, wanted.group_size, wanted.bits, mode=wanted.mode)
    ours, _ = load_uniform(ref(folders[name]), wanted)
    theirs = dict(tree_flatten(stock.parameters()))
    found = dict(tree_flatten(ours.parameters()))
    assert found.keys() == theirs.keys()
    assert all(mx.array_equal(array, found[path]) for path, array in theirs.items())
    assert parameter_nbytes(ours) == sum(array.nbytes for array in theirs.values())


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_unpacked_weights_give_the_packed_models_logits(folders: dict[str, Path], name: str) -> None:
    tokens = mx.array([[5, 80, 200, 17, 3, 99]])
    model, _ = load_uniform(ref(folders[name]), Choice(bits=4, group_size=32))
    model.set_dtype(mx.float32)
    packed = model(tokens)
    mx.eval(packed)
    unpack_weights(model)
    assert not any("scales" in module for _, module in model.named_modules())
    # Float32 sums in another order, through two blocks.
    assert mx.allclose(model(tokens), packed, rtol=1e-4, atol=1e-4)


def test_half_precision_weights_run_in_float32_on_the_cpu(folders: dict[str, Path]) -> None:
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("runs as stored on a GPU")
    model, _ = load_uniform(ref(folders["dense"]), Choice(bits=4, group_size=64))
    make_exact(model, "model")
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}


def test_batches_of_windows_give_what_single_windows_give(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_exact(stock_load(folders["dense"])[0], "model")
    tokens = np.random.default_rng(1).integers(0, 256, (7, 16)).astype(np.int32)
    together = dict(window_logits(model, tokens))
    monkeypatch.setattr(logits_module, "_BATCH_NBYTES", 1)
    alone = dict(window_logits(model, tokens))
    assert together.keys() == alone.keys() == set(range(7))
    for window, rows in together.items():
        assert rows.shape == (16, 320)
        assert np.allclose(np.array(rows), np.array(alone[window]), atol=1e-5)


def test_large_reference_goes_to_a_file_that_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logits_module, "_IN_MEMORY_NBYTES", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = np.random.default_rng(0).standard_normal((3, 5, 11)).astype(np.float32)
    with LogitCache(3) as cache:
        assert cache.vocab_size is None
        for window in range(3):
            cache.put(window, mx.array(rows[window]))
        assert len(list(tmp_path.glob("optiq-score-*/*"))) == 1
        assert cache.vocab_size == 11
        assert all(np.array_equal(np.array(cache.get(window)), rows[window]) for window in range(3))
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizer_is_refused_before_anything_is_scored(
    folders: dict[str, Path], text: str, tmp_path: Path
) -> None:
    config = {**LLAMA, "vocab_size": 384}
    other = save_model_folder(tmp_path / "other", tiny_model(config), config)
    with pytest.raises(FingerprintMismatch, match="another tokenizer"):
        score(ref(folders["dense"]), [ref(folders["mixed"]), ref(other)], options(text))


def test_other_number_of_logits_is_refused(folders: dict[str, Path], text: str) -> None:
    wider = tiny_model({**LLAMA, "vocab_size": 384})
    with (
        HeldOutScorer(ref(folders["dense"]), options(text)) as scorer,
        pytest.raises(FingerprintMismatch, match="384 logits where the reference has 320"),
    ):
        scorer.add_model(wider, "wider", nbytes=1)


def test_model_in_memory_can_be_scored(folders: dict[str, Path], text: str) -> None:
    model: nn.Module = tiny_model(seed=1)
    with HeldOutScorer(ref(folders["dense"]), options(text)) as scorer:
        row = scorer.add_model(model, "other weights", nbytes=100)
        assert row.divergence > 1.0
        assert scorer.report().rows[1] == row


def test_nothing_to_score_and_bad_choices_are_refused(folders: dict[str, Path], text: str) -> None:
    with pytest.raises(UsageError, match="nothing to score"):
        score(ref(folders["dense"]), [], options(text))
    with pytest.raises(UsageError, match="'7' is not a choice"):
        parse_uniform("4,7")
    assert parse_uniform(" 4, 6g32 ,") == (Choice(bits=4, group_size=64), Choice(bits=6, group_size=32))


def test_uniform_choice_that_fits_no_module_is_refused(tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    narrow = save_model_folder(tmp_path / "narrow", tiny_model(config), config)
    with pytest.raises(UsageError, match=r"no module of .* can be stored as 4g128"):
        load_uniform(ref(narrow), Choice(bits=4, group_size=128))


def test_other_tokens_are_refused_before_the_reference_runs(
    folders: dict[str, Path], text: str, tmp_path: Path
) -> None:
    other = save_model_folder(tmp_path / "other", tiny_model())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    events: list[Progress] = []
    with pytest.raises(FingerprintMismatch, match="has another tokenizer"):
        score(ref(folders["dense"]), [ref(other)], options(text), events.append)
    assert events == []


def test_command_prints_one_table_and_writes_the_record(
    folders: dict[str, Path], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folders["dense"]), str(folders["mixed"]), "--uniform", "4", "--held-out", text]
    words += ["--num-tokens", "128", "--window", "32"]
    assert main(["score", *words, "-o", str(tmp_path / "score.json")]) == 0
    shown = capsys.readouterr()
    assert "Held-out comparison with dense" in shown.out
    names = [line.split("  ")[0] for line in shown.out.splitlines()]
    assert [name for name in names if name in ("reference", "mixed", "uniform 4g64")] == [
        "reference",
        "mixed",
        "uniform 4g64",
    ]
    assert max(map(len, shown.out.splitlines())) <= 80
    report = read_score(tmp_path / "score.json")
    assert main(["score", *words, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out)["rows"][2]["divergence"] == pytest.approx(
        report.rows[2].divergence, rel=1e-6
    )


def test_command_without_anything_to_score_says_what_to_give(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", str(folders["dense"])]) == 2
    assert "name a checkpoint or give --uniform 4,5,6" in capsys.readouterr().err
