"""Tiny random instances of the named families: measured, allocated, converted, reloaded by stock mlx-lm."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.convert import convert as stock_convert
from msgspec.structs import replace
from support_families import save_family
from support_family_configs import COMMON, NAMED

from mlx_optiq_ext.convert.model import convert_model, expand_bit_map
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import BitMap, SensitivityTable

STREAMED = ("llama", "qwen3_moe", "qwen3_5", "deepseek_v3", "gemma4", "nemotron_h")
FULLY_CORRECTED = ("deepseek_v3", "gemma4")
VERIFIED_APART = ("qwen3_5_moe", "gemma4", "deepseek_v3")
LIKE_STOCK = ("qwen3_moe", "qwen3_5_moe", "gemma4", "nemotron_h", "deepseek_v3", "lfm2", "mamba2")
WITH_EXPERTS = (
    "qwen3_moe", "qwen3_5_moe", "qwen3_next", "gemma4_moe", "nemotron_h", "deepseek_v3", "gpt_oss", "jamba",
    "granitemoehybrid",
)  # fmt: skip
MEASURE = MeasureOptions(
    num_tokens=256, window=32, label_samples=1, probes=0, candidate_bits="3,4,6,8", candidate_groups="32",
    correction="fast",
)  # fmt: skip
TARGET_BPW = 6.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", NAMED)
def test_a_family_goes_the_whole_way(name: str, folders: Path) -> None:
    source, out = _source(folders, name), folders / f"{name}-out"
    options = ConvertOptions(
        measure=replace(MEASURE, correction="full") if name in FULLY_CORRECTED else MEASURE,
        allocate=AllocateOptions(target_bpw=TARGET_BPW),
        score=False,
        verify=name in VERIFIED_APART,
    )
    result = convert_model(source, options, out)
    table = read_sensitivity(out / "optiq" / "sensitivity.json")
    _assert_measured(table)
    assert any(unit.kind == "experts" for unit in table.units) == (name in WITH_EXPERTS)
    bit_map = expand_bit_map(table, result.allocation)
    model, config = mlx_lm_utils.load_model(out, strict=True)
    assert _loaded_bit_map(model) == _packed(bit_map)
    stored = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert stored == result.allocation.nbytes
    assert stored * 8 / table.total_numel <= TARGET_BPW
    assert config["model_type"] == NAMED[name].get("model_type", name)
    model.set_dtype(mx.float32)
    assert np.isfinite(np.array(_logits(model))).all()


@pytest.mark.parametrize("name", STREAMED)
def test_streaming_gives_the_same_table(name: str, folders: Path) -> None:
    source = _source(folders, name)
    resident = measure_sensitivity(source, _with_reference("resident"))
    streamed = measure_sensitivity(source, _with_reference("stream"))
    assert streamed.reference == "stream"
    assert [u.paths for u in streamed.units] == [u.paths for u in resident.units]
    for one, other in zip(streamed.probes, resident.probes, strict=True):
        assert (one.path, one.choice) == (other.path, other.choice)
        assert one.divergence == pytest.approx(other.divergence, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
def test_streaming_writes_the_same_checkpoint(name: str, folders: Path) -> None:
    source = _source(folders, name)
    written = []
    for how in ("resident", "stream"):
        options = ConvertOptions(
            measure=_with_reference(how), allocate=AllocateOptions(target_bpw=6.5), score=False, verify=False
        )
        convert_model(source, options, folders / f"{name}-{how}")
        written.append(mx.load(str(folders / f"{name}-{how}" / "model.safetensors")))
    assert written[0].keys() == written[1].keys()
    assert all(mx.array_equal(written[0][key], written[1][key]).item() for key in written[0])


@pytest.mark.parametrize("name", LIKE_STOCK)
def test_names_and_types_of_kept_tensors_are_those_of_stock_convert(name: str, folders: Path) -> None:
    source, ours, stock = _source(folders, name), folders / f"{name}-ours", folders / f"{name}-stock"
    static = MeasureOptions(method="static", candidate_bits="8", candidate_groups="32")
    options = ConvertOptions(
        measure=static, allocate=AllocateOptions(target_bpw=16.0), score=False, verify=False
    )
    convert_model(source, options, ours)
    stock_convert(source.path, mlx_path=str(stock), quantize=True, q_bits=8, q_group_size=32)
    written, expected = _tensors(ours), _tensors(stock)
    assert _bare(written) == _bare(expected)
    kept = {n: d for n, d in expected.items() if not _is_packed(n, expected) and not _is_packed(n, written)}
    assert {n: written[n] for n in kept} == kept


def _assert_measured(table: SensitivityTable) -> None:
    """Every unit that can be packed has a finite cost, above zero at its cheapest choice, or a note."""
    for unit in table.units:
        costs = [p.divergence for p in table.probes if p.path == unit.path]
        assert len(costs) == len(unit.choices), unit.path
        assert np.isfinite(costs).all(), unit.path
        if unit.choices[0].mode == "keep":
            assert unit.floor is not None or unit.shape[-1] % 32, unit.path
        else:
            assert max(costs) > 0, unit.path


def _loaded_bit_map(model: object) -> dict[str, object]:
    found = {}
    for path, module in model.named_modules():  # type: ignore[attr-defined]
        if hasattr(module, "bits") and "scales" in module:
            found[path] = (module.bits, module.group_size, getattr(module, "mode", "affine"))
    return found


def _packed(bit_map: BitMap) -> dict[str, object]:
    return {p: (c.bits, c.group_size, c.mode) for p, c in bit_map.choices.items() if c.mode != "keep"}


def _source(folders: Path, name: str) -> ModelRef:
    path = folders / name
    if not path.is_dir():
        save_family(path, name)
    return ModelRef(path=str(path), source=name)


def _with_reference(how: str) -> MeasureOptions:
    return MeasureOptions(
        num_tokens=256, window=32, label_samples=1, probes=0, candidate_bits="4", candidate_groups="32",
        correction="fast", reference=how,  # type: ignore[arg-type]
    )  # fmt: skip


def _logits(model: object) -> mx.array:
    output = model(mx.arange(16)[None] % COMMON["vocab_size"])  # type: ignore[operator]
    return output if isinstance(output, mx.array) else output[0]


def _tensors(folder: Path) -> dict[str, mx.Dtype]:
    return {
        name: array.dtype
        for file in folder.glob("*.safetensors")
        for name, array in mx.load(str(file)).items()
    }


def _bare(tensors: dict[str, mx.Dtype]) -> set[str]:
    return {name for name in tensors if not name.endswith((".scales", ".biases"))}


def _is_packed(name: str, tensors: dict[str, mx.Dtype]) -> bool:
    return f"{name.rpartition('.')[0]}.scales" in tensors
