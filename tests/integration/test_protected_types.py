"""Parameters whose type a family protects are counted in the type they are written in."""

from pathlib import Path

import mlx.core as mx
import pytest
from support_families import save_family

from mlx_optiq_ext.convert import model as convert_module
from mlx_optiq_ext.convert.model import convert_model
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.reference import Reference
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import KEEP, Choice

STATIC = MeasureOptions(method="static", candidate_bits="4,8", candidate_groups="32")


def _in_bfloat16(folder: Path, name: str) -> ModelRef:
    """A tiny instance of a family with every tensor in bfloat16."""
    save_family(folder, name)
    file = str(folder / "model.safetensors")
    weights = {key: array.astype(mx.bfloat16) for key, array in mx.load(file).items()}
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    return ModelRef(path=str(folder), source=name)


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_5", "auto"), ("nemotron_h", "auto"), ("nemotron_h", "float32")]
)
def test_a_source_in_bfloat16_alone_has_the_bytes_that_were_planned(
    name: str, dtype: str, tmp_path: Path
) -> None:
    source = _in_bfloat16(tmp_path / "source", name)
    options = ConvertOptions(
        measure=STATIC, allocate=AllocateOptions(target_bpw=12.0), dtype=dtype, score=False, verify=True
    )
    result = convert_model(source, options, tmp_path / "out")
    assert result.verification is not None
    assert result.verification.nbytes == result.allocation.nbytes
    assert mx.bfloat16 in {
        array.dtype
        for key, array in mx.load(str(tmp_path / "out" / "model.safetensors")).items()
        if key.endswith(("A_log", "e_score_correction_bias"))
    }


def test_a_weight_whose_wider_type_is_protected_is_kept_and_counted_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _in_bfloat16(tmp_path / "source", "llama")
    file = str(tmp_path / "source" / "model.safetensors")
    weights = dict(mx.load(file))
    path = "model.layers.1.mlp.up_proj"
    weights[f"{path}.weight"] = weights[f"{path}.weight"].astype(mx.float32)
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    plain = Reference(source)
    kind = type(plain.model)
    monkeypatch.setattr(
        kind, "cast_predicate", property(lambda _: lambda key: path not in key), raising=False
    )
    reference = Reference(source)
    candidates = (Choice(bits=4, group_size=32),)
    units = reference.units(candidates)
    assert {unit.path for unit in units if unit.choices == (KEEP,)} == {path}
    extra = 16 * get_module(reference.model, path).weight.size
    assert reference.fixed_bits(units) == plain.fixed_bits(plain.units(candidates)) + extra


def test_the_cache_of_a_float32_checkpoint_is_counted_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(*_: object, float_bits: int) -> int:
        asked.append(float_bits)
        return 1

    monkeypatch.setattr(convert_module, "kv_bytes_per_token", counted)
    source = _in_bfloat16(tmp_path / "source", "llama")
    options = ConvertOptions(
        measure=STATIC, allocate=AllocateOptions(fit="8GB"), dtype="float32", score=False, verify=False
    )
    convert_model(source, options, tmp_path / "out")
    assert set(asked) == {32}
