from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from support_tables import CALIBRATION, HELD_OUT, make_allocation, make_table

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.metadata import decode_metadata, find_metadata, read_metadata, write_metadata
from mlx_optiq_ext.types.metadata import CheckpointMetadata, MeasuredDivergence, PublishedMetadata
from mlx_optiq_ext.types.quant import KEEP, Choice
from mlx_optiq_ext.types.verify import VerifyReport


def make_metadata() -> CheckpointMetadata:
    table = make_table(blocks=2)
    return CheckpointMetadata(
        package_version="0.1.0",
        base_model="example/base-135m",
        model=table.model,
        method="fisher",
        reference="resident",
        calibration=CALIBRATION,
        allocation=make_allocation(table),
        measured=MeasuredDivergence(divergence=0.05, stderr=0.002, held_out=HELD_OUT),
        verification=VerifyReport(
            num_paths=15,
            num_tensors=40,
            nbytes=1000,
            mlx="0.32.4",
            mlx_lm="0.32.2",
            forward="finite logits",
            seconds=1.0,
        ),
        command="optiq convert example/base-135m --target-bpw 5.0 -o out",
    )


def test_ours_round_trips_through_a_folder(tmp_path: Path) -> None:
    metadata = make_metadata()
    path = write_metadata(tmp_path, metadata)
    assert path == tmp_path / "optiq" / "metadata.json" == find_metadata(tmp_path)
    assert read_metadata(tmp_path) == metadata
    assert metadata.bit_map is metadata.allocation.bit_map
    assert msgspec.json.decode(path.read_bytes())["format_version"] == 1


PUBLISHED = b"""{"method": "optiq_mixed_precision", "base_model": "Qwen/Qwen3.5-9B", "reference":
"uniform_4bit",
"target_bpw": 5.0, "achieved_bpw": 5.01, "n_high_bits": 1, "n_low_bits": 1, "threshold": 0.02, "per_layer":
{"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 64}, "lm_head": {"bits": 8, "group_size": 64},
"model.layers.0.mlp.gate": false, "model.layers.1.mlp.gate": {"bits": 16, "group_size": 64},
"model.layers.1.mlp.up_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}}"""


def test_published_form_is_read() -> None:
    metadata = decode_metadata(PUBLISHED)
    assert isinstance(metadata, PublishedMetadata)
    assert (metadata.base_model, metadata.method, metadata.reference) == (
        "Qwen/Qwen3.5-9B",
        "optiq_mixed_precision",
        "uniform_4bit",
    )
    assert (metadata.target_bpw, metadata.achieved_bpw) == (5.0, 5.01)
    assert metadata.bit_map.choices == {
        "model.layers.0.mlp.up_proj": Choice(bits=4, group_size=64),
        "lm_head": Choice(bits=8, group_size=64),
        "model.layers.0.mlp.gate": KEEP,
        "model.layers.1.mlp.gate": KEEP,
        "model.layers.1.mlp.up_proj": Choice(bits=4, group_size=32, mode="mxfp4"),
    }


def test_older_published_form_at_the_old_place_is_read(tmp_path: Path) -> None:
    (tmp_path / "optiq_metadata.json").write_text(
        '{"base_model": "a/b", "optimization": {"target_bpw": 4.5, "per_layer": {"lm_head": {"bits": 8}}}}'
    )
    metadata = read_metadata(tmp_path)
    assert isinstance(metadata, PublishedMetadata)
    assert (metadata.base_model, metadata.target_bpw, metadata.achieved_bpw) == ("a/b", 4.5, None)
    assert metadata.bit_map.choices == {"lm_head": Choice(bits=8, group_size=64)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "not a conversion record: it has no format_version"),
        (b'{"format_version": 2}', "format version 2, this package reads up to 1: upgrade"),
        (b'{"format_version": 1, "base_model": "x"}', "missing required field"),
        (b'{"base_model": "x"}', "neither format_version nor per_layer"),
        (b'{"per_layer": {"a": {"bits": 7}}}', "is not a choice"),
    ],
)
def test_what_cannot_be_understood_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_metadata(data)


def test_unknown_fields_of_our_own_form_are_refused() -> None:
    encoded = msgspec.json.encode(replace(make_metadata(), command=""))
    with pytest.raises(UsageError, match="unknown field `surprise`"):
        decode_metadata(encoded[:-1] + b',"surprise":1}')


def test_folder_without_metadata_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optiq did not make this checkpoint"):
        read_metadata(tmp_path)
