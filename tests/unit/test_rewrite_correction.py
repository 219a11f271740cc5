"""The writer rounds every mode as the measurement did, and builds few Grams at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support_codes import weighted_error
from support_measure import quick_options, save_tiny, write_calibration
from support_models import LLAMA, QWEN3_MOE

from mlx_optiq_ext.convert import rewrite
from mlx_optiq_ext.convert.rewrite import Rewriter
from mlx_optiq_ext.measure.moments import ExpertGrams
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.correct import Level, pack_fast, pack_plain, unpack
from mlx_optiq_ext.quant.reference import open_reference, parse_candidates
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import ignore_progress
from mlx_optiq_ext.types.quant import BitMap, Choice

TOKENS = mx.array(np.random.default_rng(2).integers(0, 256, (4, 32)))
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("text") / "text.jsonl")


def _rewritten(
    folder: Path, text: Path, label: str, level: Level, tokens: mx.array | None = TOKENS
) -> tuple[dict[str, mx.array], list[str]]:
    """Weights of a tiny model after it is rewritten at one choice, and the fallbacks."""
    options = quick_options(text, candidate_bits=label)
    reference = open_reference(_ref(folder), options)
    choice = Choice.parse(label)
    paths = [path for unit in reference.units(parse_candidates(options)) for path in unit.paths]
    rewriter = Rewriter(
        reference, BitMap(choices=dict.fromkeys(paths, choice)), level=level, dtype=mx.bfloat16, columns={},
        writer=None,
    )  # fmt: skip
    rewriter.run(tokens, ignore_progress)
    return dict(tree_flatten(reference.model.parameters())), rewriter.fallbacks


def _ref(folder: Path, config: dict[str, Any] = LLAMA) -> ModelRef:
    return ModelRef(path=str(folder), source="tiny") if folder.exists() else save_tiny(folder, config)


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("label", ["mxfp4", "nvfp4"])
def test_float_modes_are_written_with_the_scales_that_were_measured(
    text: Path, tmp_path: Path, label: str, level: Level
) -> None:
    ref, choice = _ref(tmp_path / "model"), Choice.parse(label)
    model = open_reference(ref, quick_options(text)).model
    weight = get_module(model, FIRST).weight
    seen = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS)).astype(mx.float32)
    importance = mx.mean(mx.square(seen), axis=(0, 1))
    weights, fallbacks = _rewritten(tmp_path / "model", text, label, level)
    written = weights[f"{FIRST}.weight"]
    plain, fitted = (
        pack_plain(weight, choice, float_dtype=mx.bfloat16),
        pack_fast(weight, choice, importance, float_dtype=mx.bfloat16),
    )
    assert fallbacks == []
    assert not mx.array_equal(written, unpack(plain, choice).astype(written.dtype))
    error = np.square(np.array(written.astype(mx.float32)) - np.array(weight.astype(mx.float32)))
    ours = float((error * np.array(importance)).sum())
    assert ours < 0.999 * weighted_error(weight, plain, choice, importance)
    assert ours == pytest.approx(weighted_error(weight, fitted, choice, importance), rel=1e-2)


def test_float_modes_without_inputs_are_reported(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ref(tmp_path / "model")
    monkeypatch.setattr(rewrite, "input_moments", lambda *_, **__: None)
    weights, fallbacks = _rewritten(tmp_path / "model", text, "mxfp4", "fast")
    plain, _ = _rewritten(tmp_path / "model", text, "mxfp4", "none")
    assert FIRST in fallbacks
    assert mx.array_equal(weights[f"{FIRST}.weight"], plain[f"{FIRST}.weight"])


def test_experts_grams_are_built_a_few_at_a_time_with_the_same_result(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ref(tmp_path / "model", QWEN3_MOE)
    built: list[int] = []
    original = ExpertGrams.of

    def count(self: ExpertGrams, experts: Sequence[int]) -> mx.array:
        built.append(len(experts))
        return original(self, experts)

    monkeypatch.setattr(ExpertGrams, "of", count)
    together, _ = _rewritten(tmp_path / "model", text, "4g32", "full")
    assert set(built) == {QWEN3_MOE["num_experts"]}
    built.clear()
    monkeypatch.setattr(rewrite, "_CHUNK_WEIGHTS", QWEN3_MOE["hidden_size"] ** 2)
    alone, _ = _rewritten(tmp_path / "model", text, "4g32", "full")
    assert min(built) == 1
    assert sum(built) == 2 * 3 * QWEN3_MOE["num_experts"]  # two blocks of three stacks
    assert together.keys() == alone.keys()
    for name, array in together.items():
        assert mx.array_equal(array, alone[name]), name
