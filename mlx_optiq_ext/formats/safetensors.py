"""safetensors files: read the header, write tensor by tensor.

Knows bytes, not arrays: a tensor is a dtype name, a shape and a buffer. The writer keeps at most a few
megabytes, so that a shard of any size costs no memory; used by ``quant.write`` and ``quant.verify``.
"""

import json
import math
import struct
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import unwritable

__all__ = ["DTYPE_NBYTES", "SafetensorsWriter", "StoredTensor", "read_folder", "read_header"]

DTYPE_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_BUFFER_NBYTES = 32 << 20
_RESERVED_HEADER = 512 << 10
_MAX_HEADER = 100_000_000
_REMEDY = "download or convert the model again"


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int
    """Of its first byte in the file."""


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, dtypes, shapes and places of all tensors of one file; reads no tensor.

    Raises:
        UsageError: Not a whole safetensors file; says what is wrong.
    Source: safetensors format: 8 bytes little-endian header length, JSON header, data without holes.
    """
    file_nbytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, file_nbytes - 8):
            raise UsageError(
                f"{path} is not a safetensors file or is cut off: header length {length}; {_REMEDY}"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UsageError(f"{path} has an unreadable safetensors header: {error}; {_REMEDY}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path} has an unreadable safetensors header: not an object; {_REMEDY}")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != file_nbytes:
        raise UsageError(
            f"{path} has {file_nbytes} bytes where its header describes {end}: cut off or damaged; {_REMEDY}"
        )
    return tensors


def read_folder(folder: Path, pattern: str = "model*.safetensors") -> dict[str, StoredTensor]:
    """The headers of all files of a checkpoint that mlx-lm would load, as one.

    Raises:
        UsageError: No such file, a damaged one, or a tensor name in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    files = sorted(folder.glob(pattern))
    if not files:
        raise UsageError(f"no {pattern} in {folder}; give the folder of a Hugging Face or MLX model")
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise UsageError(
                    f"tensor {name} is in {tensors[name].file} and in {path.name} of {folder}; {_REMEDY}"
                )
            tensors[name] = tensor
    return tensors


class SafetensorsWriter:
    """Write one file, tensor by tensor.

    Tensors are kept until they make 32 MiB; a larger file gets its header's place reserved (the format
    allows trailing blanks) and its tensors go straight to disk. Memory: 32 MiB.
    """

    def __init__(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self.nbytes = 0
        self._entries: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        self._header_nbytes = len(json.dumps(self._entries))
        self._pending: list[bytes] = []
        self._file: BinaryIO | None = None

    @property
    def names(self) -> list[str]:
        """Tensors added so far."""
        return [name for name in self._entries if name != "__metadata__"]

    @property
    def is_full(self) -> bool:
        """Whether the header's reserved place has no room for another tensor of usual name length."""
        return self._header_nbytes > _RESERVED_HEADER - 1024

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> None:
        """Append one tensor.

        Args:
            name: New within this file.
            dtype: safetensors name, such as ``BF16``.
            shape: Its dimensions.
            data: All its bytes, row-major.
        Raises:
            UsageError: The name is taken, or the bytes do not fit the shape.
            ResourceError: The disk is full.
        """
        expected = DTYPE_NBYTES[dtype] * math.prod(shape)
        view = memoryview(data)
        if name in self._entries or view.nbytes != expected:
            raise UsageError(
                f"cannot add tensor {name}: taken, or {view.nbytes} bytes for {dtype} {list(shape)}"
            )
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [self.nbytes, self.nbytes + expected]}
        self._entries[name] = entry
        self._header_nbytes += len(json.dumps({name: entry})) + 2
        self.nbytes += expected
        try:
            self._append(view)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Write the header; the file is complete only after this.

        Raises:
            ResourceError: The disk is full.
        """
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        try:
            if self._file is None:
                with self.path.open("wb") as file:
                    file.write(_padded(header, (len(header) + 7) // 8 * 8))
                    file.writelines(self._pending)
            else:
                self._file.seek(0)
                self._file.write(_padded(header, _RESERVED_HEADER))
                self._file.close()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._pending.clear()

    def _append(self, view: memoryview) -> None:
        if self._file is None and self.nbytes <= _BUFFER_NBYTES:
            self._pending.append(bytes(view))
            return
        if self._file is None:
            self._file = self.path.open("wb")
            self._file.seek(8 + _RESERVED_HEADER)
            self._file.writelines(self._pending)
            self._pending.clear()
        self._file.write(view)


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def _entry(path: Path, name: str, raw: object, data_start: int) -> StoredTensor:
    try:
        entry = msgspec.convert(raw, _HeaderEntry)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} describes tensor {name} wrongly: {error}; {_REMEDY}") from error
    begin, end = entry.data_offsets
    expected = DTYPE_NBYTES.get(entry.dtype, end - begin)
    if entry.dtype in DTYPE_NBYTES:
        expected *= math.prod(entry.shape)
    if begin < 0 or end < begin or expected != end - begin:
        kind = f"{entry.dtype} {list(entry.shape)}"
        raise UsageError(f"{path} gives tensor {name} bytes {begin} to {end} for {kind}; {_REMEDY}")
    return StoredTensor(
        dtype=entry.dtype, shape=entry.shape, nbytes=end - begin, file=path.name, offset=data_start + begin
    )


def _padded(header: bytes, length: int) -> bytes:
    if len(header) > length:
        raise UsageError(f"safetensors header of {len(header)} bytes does not fit {length}")
    return struct.pack("<Q", length) + header.ljust(length, b" ")
