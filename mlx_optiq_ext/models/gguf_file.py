"""Read a GGUF file: metadata, tensor table and raw tensor bytes, mapped rather than loaded.

Knows the container only, nothing of model families, tokenizers or how blocks are decoded. Called by the
importer.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

import math
import struct
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.models.gguf_blocks import BLOCK_TYPES, BlockType

__all__ = ["GgufFile", "GgufTensor", "MetadataValue", "read_gguf"]

MetadataValue: TypeAlias = bool | int | float | str | list[str] | npt.NDArray[np.generic]

_SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING = 8
_ARRAY = 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4


class GgufTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Row-major shape: (O, I) for a matrix."""
    block_type: BlockType
    start: int
    """First byte in the file."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.numel // self.block_type.numel * self.block_type.nbytes


class GgufFile(msgspec.Struct, frozen=True, kw_only=True):
    """A mapped GGUF file."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]
    data: npt.NDArray[np.uint8]
    """The whole file, mapped read-only."""

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Stored blocks of one tensor, shape (num_blocks, bytes per block), mapped."""
        flat = self.data[tensor.start : tensor.start + tensor.nbytes]
        return flat.reshape(-1, tensor.block_type.nbytes)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of the metadata; UsageError where it is missing and has no default."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the metadata, as the shortest decimal that gives the stored float32."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number", value)
        if not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata; UsageError where it is missing and has no default."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of the metadata."""
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "a boolean", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings of the metadata; empty where it is missing."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings", value)
        return value

    def numbers(self, key: str) -> npt.NDArray[np.generic] | None:
        """A list of numbers of the metadata; None where it is missing."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._wrong(key, "a list of numbers", value)
        return value

    def _wrong(self, key: str, wanted: str, value: object) -> UsageError:
        found = "nothing" if value is None else f"{type(value).__name__}"
        return UsageError(
            f"{self.path.name}: metadata {key!r} should be {wanted}, found {found}; the file is damaged"
        )


class _Cursor:
    """Walks the header; every read is bounds-checked."""

    def __init__(self, data: npt.NDArray[np.uint8], name: str) -> None:
        self.data = data
        self.position = 0
        self.name = name

    def take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if nbytes < 0 or end > self.data.size:
            raise UsageError(
                f"{self.name}: file ends inside its header, at byte {self.position}; download it again"
            )
        chunk = self.data[self.position : end].tobytes()
        self.position = end
        return chunk

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8", errors="replace")

    def value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        item: bool | int | float = self.numbers(kind, 1)[0].item()
        return item

    def array(self) -> MetadataValue:
        kind, length = self.u32(), self.u64()
        if kind == _STRING:
            return [self.string() for _ in range(length)]
        return self.numbers(kind, length)

    def numbers(self, kind: int, length: int) -> npt.NDArray[np.generic]:
        if kind not in _SCALARS:
            raise UsageError(
                f"{self.name}: unknown metadata type {kind} at byte {self.position}; the file is damaged"
            )
        dtype = _SCALARS[kind]
        return np.frombuffer(self.take(length * dtype.itemsize), dtype=dtype)


def read_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and parse its header.

    Args:
        path: The file.
    Returns:
        Metadata and tensor table; tensor bytes stay on disk until they are touched.
    Raises:
        UsageError: Not a GGUF file, an unknown version, or a truncated one.
    """
    if not path.is_file() or path.stat().st_size < 24:
        raise UsageError(f"{path}: not a GGUF file (missing or shorter than a header)")
    data: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    cursor = _Cursor(data, path.name)
    if cursor.take(4) != b"GGUF":
        raise UsageError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
    version = cursor.u32()
    if version not in (2, 3):
        raise UsageError(
            f"{path.name}: GGUF version {version} is not readable (2 and 3, little-endian, are); convert"
            " it again"
        )
    num_tensors, num_entries = cursor.u64(), cursor.u64()
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise UsageError(f"{path.name}: alignment {alignment!r} makes no sense; the file is damaged")
    base = -(-cursor.position // alignment) * alignment
    tensors = {t.name: msgspec.structs.replace(t, start=base + t.start) for t in entries}
    for tensor in tensors.values():
        if tensor.start + tensor.nbytes > data.size:
            raise UsageError(
                f"{path.name}: tensor {tensor.name} ends at byte {tensor.start + tensor.nbytes}, the file"
                f" has {data.size}; the download is incomplete"
            )
    return GgufFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _tensor_entry(cursor: _Cursor) -> GgufTensor:
    """One row of the tensor table; ``start`` is still relative to the data section."""
    name = cursor.string()
    num_dims = cursor.u32()
    if num_dims > _MAX_DIMS:
        raise UsageError(f"{cursor.name}: tensor {name} has {num_dims} dimensions; the file is damaged")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    type_id, start = cursor.u32(), cursor.u64()
    block_type = BLOCK_TYPES.get(type_id)
    if block_type is None:
        readable = ", ".join(t.name for t in BLOCK_TYPES.values())
        raise UsageError(
            f"{cursor.name}: tensor {name} is stored as GGUF type {type_id}, which is not readable; types"
            f" that are: {readable}"
        )
    if shape and shape[-1] % block_type.numel:
        raise UsageError(
            f"{cursor.name}: rows of tensor {name} {shape} are no multiple of {block_type.numel}"
            f" ({block_type.name}); the file is damaged"
        )
    return GgufTensor(name=name, shape=shape, block_type=block_type, start=start)
