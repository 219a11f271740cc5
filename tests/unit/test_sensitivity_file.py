"""Sensitivity and bit map files: versions, published forms, refusals."""

import json
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from support_tables import make_table

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.formats.allocation import read_allocation, write_allocation
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Choice

LAYERS = [
    {
        "layer_name": "model.embed_tokens",
        "sensitivities": {"4": 0.5, "8": 0.01},
        "param_count": 8192,
        "metadata": {"shape": [64, 128]},
    },
    {
        "layer_name": "model.layers.3.mlp.down_proj.weight",
        "sensitivities": {"8": 0.002, "4": 0.05, "2": None},
        "param_count": 4096,
        "metadata": {},
    },
]
PUBLISHED = {
    "base_model": "example/base",
    "candidate_bits": [4, 8],
    "group_size": 32,
    "metric": "kl_divergence_vs_reference",
    "layers": LAYERS,
}


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("name", ["sensitivity.json", "optiq/sensitivity.json"])
def test_folder_stands_for_the_file_in_it(tmp_path, name) -> None:
    table = make_table(blocks=2)
    write_sensitivity(tmp_path / name, table)
    assert read_sensitivity(tmp_path) == read_sensitivity(str(tmp_path / name)) == table


def test_published_file_is_read_with_the_facts_it_has(tmp_path) -> None:
    table = read_sensitivity(write(tmp_path / "sensitivity.json", PUBLISHED))
    embedding, down = table.units
    assert table.method == "published"
    assert table.model.source == "example/base"
    assert (embedding.kind, embedding.shape, embedding.block) == ("embedding", (64, 128), None)
    assert (down.path, down.block, down.module) == ("model.layers.3.mlp.down_proj", 3, "mlp.down_proj")
    assert down.shape == ()
    assert down.choices == (Choice(bits=4, group_size=32), Choice(bits=8, group_size=32))
    assert {(p.path, p.choice.bits): p.divergence for p in table.probes} == {
        ("model.embed_tokens", 4): 0.5,
        ("model.embed_tokens", 8): 0.01,
        ("model.layers.3.mlp.down_proj", 4): 0.05,
        ("model.layers.3.mlp.down_proj", 8): 0.002,
    }
    assert all(probe.exact for probe in table.probes)
    assert table.total_numel == 12288
    assert any("not counted" in note for note in table.notes)


def test_published_checkpoint_is_a_bare_list_in_groups_of_64(tmp_path) -> None:
    table = read_sensitivity(write(tmp_path / "sensitivity_checkpoint.json", LAYERS))
    assert table.units[0].choices == (Choice(bits=4, group_size=64), Choice(bits=8, group_size=64))


def test_published_not_a_number_is_left_out(tmp_path) -> None:
    file = tmp_path / "sensitivity_checkpoint.json"
    file.write_text(json.dumps(LAYERS).replace("0.01", "NaN"))
    assert [c.bits for c in read_sensitivity(file).units[0].choices] == [4]


def test_published_table_can_be_allocated(tmp_path) -> None:
    table = read_sensitivity(write(tmp_path / "sensitivity.json", PUBLISHED))
    allocation = allocate(table, AllocateOptions(target_bpw=8.0))
    assert {path: choice.label for path, choice in allocation.bit_map.choices.items()} == {
        "model.embed_tokens": "8g32",
        "model.layers.3.mlp.down_proj": "4g32",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param_count": 0}, "has no param_count"),
        ({"sensitivities": {}}, "has no finite measurement"),
        ({"sensitivities": {"7": 0.1}}, "'7' is not a choice"),
        ({"layer_name": 3}, "not a published sensitivity file"),
    ],
)
def test_broken_published_entry_is_refused(tmp_path, change, message) -> None:
    file = write(tmp_path / "sensitivity.json", [LAYERS[0] | change])
    with pytest.raises(UsageError, match=message):
        read_sensitivity(file)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_version_is_refused_with_advice(tmp_path, version) -> None:
    document = msgspec.to_builtins(make_table(blocks=1)) | {"format_version": version}
    with pytest.raises(UsageError, match="reads up to 1: upgrade mlx-optiq-ext, or measure again"):
        read_sensitivity(write(tmp_path / "table.json", document))


def test_wrong_field_is_named_with_its_place(tmp_path) -> None:
    document = msgspec.to_builtins(make_table(blocks=1))
    document["probes"][1]["divergence"] = "much"
    with pytest.raises(UsageError, match=r"probes\[1\]\.divergence|\$\.probes"):
        read_sensitivity(write(tmp_path / "table.json", document))


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe", b'{"a": 1}', b"3", b"[]"])
def test_other_files_are_refused(tmp_path, content) -> None:
    file = tmp_path / "table.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"table\.json"):
        read_sensitivity(file)


def test_missing_file_and_empty_folder_are_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot read sensitivity file"):
        read_sensitivity(tmp_path / "none.json")
    with pytest.raises(UsageError, match="has no sensitivity file"):
        read_sensitivity(tmp_path)


def test_number_that_is_not_finite_is_never_written(tmp_path) -> None:
    table = make_table(blocks=1)
    bad = replace(table.probes[3], stderr=float("nan"))
    with pytest.raises(MeasurementError, match=f"{bad.path} as {bad.choice.label} is not finite"):
        write_sensitivity(tmp_path / "table.json", replace(table, probes=(*table.probes, bad)))
    assert list(tmp_path.iterdir()) == []


def test_bit_map_file_comes_back(tmp_path) -> None:
    allocation = allocate(make_table(blocks=2), AllocateOptions(target_bpw=5.0, pin=("*.0.*=8",)))
    write_allocation(tmp_path / "map.json", allocation)
    assert read_allocation(tmp_path / "map.json") == allocation


@pytest.mark.parametrize("content", ["[]", '{"format_version": 9}', "x", '{"format_version": 1}'])
def test_other_bit_map_files_are_refused(tmp_path, content) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(UsageError, match="optiq allocate -o"):
        read_allocation(tmp_path / "map.json")
