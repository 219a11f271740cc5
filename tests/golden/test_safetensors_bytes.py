import struct
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats import safetensors as module
from mlx_optiq_ext.formats.safetensors import SafetensorsWriter, read_folder, read_header


def test_exact_bytes_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(path, {"format": "mlx"})
    writer.add("x", "U8", (2,), b"\x01\x02")
    writer.add("y", "F32", (), struct.pack("<f", 1.0))
    writer.close()
    header = (
        b'{"__metadata__":{"format":"mlx"},"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"y":{"dtype":"F32","shape":[],"data_offsets":[2,6]}}'
    )
    length = (len(header) + 7) // 8 * 8
    assert path.read_bytes() == struct.pack("<Q", length) + header.ljust(length) + b"\x01\x02\x00\x00\x80\x3f"


def test_file_beyond_the_buffer_is_streamed_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER_NBYTES", 64)
    path = tmp_path / "model.safetensors"
    arrays = {f"t{i}": mx.arange(10, dtype=mx.uint32) + i for i in range(5)}
    writer = SafetensorsWriter(path, {"format": "mlx"})
    for name, array in arrays.items():
        writer.add(name, "U32", (10,), memoryview(array))
    writer.close()
    loaded = mx.load(str(path))
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in arrays.items()
    }
    assert {name: entry.nbytes for name, entry in read_header(path).items()} == dict.fromkeys(arrays, 40)


def test_bytes_that_do_not_fit_the_shape_are_refused(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="3 bytes for U8"):
        writer.add("x", "U8", (2,), b"abc")
    writer.add("x", "U8", (3,), b"abc")
    with pytest.raises(UsageError, match="taken"):
        writer.add("x", "U8", (3,), b"abc")


def test_cut_file_and_doubled_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        writer = SafetensorsWriter(tmp_path / name)
        writer.add("x", "U8", (3,), b"abc")
        writer.close()
    with pytest.raises(UsageError, match=r"tensor x is in model-1\.safetensors and in model-2"):
        read_folder(tmp_path)
    whole = (tmp_path / "model-1.safetensors").read_bytes()
    (tmp_path / "model-1.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="cut off or damaged"):
        read_header(tmp_path / "model-1.safetensors")
    with pytest.raises(UsageError, match=r"no model\*\.safetensors"):
        read_folder(tmp_path / "nowhere")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 90), value=st.integers(0, 255), cut=st.integers(0, 90))
def test_damaged_header_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    writer = SafetensorsWriter(path)
    writer.add("x", "U8", (3,), b"abc")
    writer.close()
    data = bytearray(path.read_bytes())
    data[min(position, len(data) - 1)] = value
    path.write_bytes(bytes(data[: len(data) - cut]) if cut < 40 else bytes(data))
    try:
        tensors = read_header(path)
    except UsageError:
        return
    assert all(tensor.offset + tensor.nbytes <= path.stat().st_size for tensor in tensors.values())
