"""Write an ordinary MLX checkpoint, tensor by tensor.

The result is what stock mlx-lm's ``save`` would write for the same arrays: shards, index, config, tokenizer.
Knows nothing of measuring or allocating. Called by ``quant.convert`` inside an ``atomic_folder``.
"""

import contextlib
import copy
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import msgspec
from mlx_lm.utils import save_config

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import unwritable, write_json_atomic
from mlx_optiq_ext.formats.safetensors import SafetensorsWriter
from mlx_optiq_ext.types.quant import KEEP, BitMap, Choice

__all__ = ["CheckpointWriter", "SavesTokenizer", "WrittenCheckpoint", "quantization_config"]

_DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.float32: "F32", mx.uint64: "U64",
    mx.int64: "I64", mx.float64: "F64", mx.complex64: "C64",
}  # fmt: skip

_GIB = 1 << 30


class SavesTokenizer(Protocol):
    """What is asked of a tokenizer: mlx-lm's ``TokenizerWrapper`` and every transformers tokenizer do it."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files into a folder."""
        ...


class WrittenCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What :meth:`CheckpointWriter.finish` wrote."""

    files: tuple[str, ...]
    """Weight files in order."""
    num_tensors: int
    nbytes: int
    """Bytes of all tensors, without file headers."""
    total_parameters: int
    """Weights, counted as before quantization."""


def quantization_config(bit_map: BitMap) -> dict[str, Any] | None:
    """The ``quantization`` entry of config.json for a bit map; None where nothing is quantized.

    The top level names the choice that most paths have; every quantized path has an entry of its own with
    all three keys, a kept one has none (its missing scales say so to every loader).
    """
    quantized = {path: choice for path, choice in sorted(bit_map.choices.items()) if choice.mode != "keep"}
    if not quantized:
        return None
    counts = Counter(quantized.values())
    default = max(counts, key=lambda choice: (counts[choice], choice))
    return {**_settings(default), **{path: _settings(choice) for path, choice in quantized.items()}}


class CheckpointWriter:
    """Stream tensors into shards, then finish with index, config and tokenizer.

    Memory: the tensor at hand and 32 MiB; a shard is never held. Files have temporary names until
    :meth:`finish`, since their final names contain their number.

    Args:
        folder: Existing working folder.
        max_shard_bytes: A shard is closed before it would exceed this; a larger tensor gets its own.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = 5 * _GIB) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._shard: SafetensorsWriter | None = None
        self._shards: list[SafetensorsWriter] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor written so far, by name."""
        return self._shapes

    def add(self, name: str, array: mx.array) -> None:
        """Evaluate one tensor and write it.

        The caller drops its own references afterwards; nothing of the array is kept here.

        Args:
            name: Name in mlx-lm's module tree, such as ``model.layers.0.mlp.up_proj.scales``.
            array: Any dtype; bytes are written as they are.
        Raises:
            UsageError: The name was written before, or safetensors has no such dtype.
            ResourceError: The disk is full.
        """
        if name in self._shapes:
            raise UsageError(f"tensor {name} was written before")
        if array.dtype not in _DTYPES:
            raise UsageError(f"tensor {name} has dtype {array.dtype}, which safetensors cannot hold")
        shard = self._shard_for(array.nbytes)
        flat = mx.contiguous(array.reshape(-1)).view(mx.uint8)
        mx.eval(flat)
        shard.add(name, _DTYPES[array.dtype], tuple(array.shape), memoryview(flat))  # type: ignore[arg-type]
        self._shapes[name] = tuple(array.shape)

    def finish(
        self,
        config: dict[str, Any],
        bit_map: BitMap,
        *,
        tokenizer: SavesTokenizer | None = None,
        source: Path | None = None,
        keep_vision_config: bool = False,
    ) -> WrittenCheckpoint:
        """Name the shards and write everything that is not a tensor.

        Args:
            config: The model's config as mlx-lm loaded it; not changed. An older quantization in it is
                replaced by the bit map's.
            bit_map: Choice of every path that can be packed, those included that came packed.
            tokenizer: Saved into the folder as stock mlx-lm does.
            source: Folder of the source model; its ``*.py`` and ``generation_config.json`` are copied.
            keep_vision_config: For models that keep their vision tower.
        Raises:
            UsageError: No tensor was written.
            ResourceError: The disk is full, or a file cannot be written.
        Source: mlx_lm.utils ``save``, ``save_model`` and ``save_config`` (files and keys).
        """
        self._close_shard()
        if not self._shards:
            raise UsageError(f"no tensor was written to {self.folder}")
        with _writing_to(self.folder):
            written = self._write_index(bit_map)
            self._write_config(config, bit_map, keep_vision_config)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(self.folder))
            if source is not None:
                for path in [*sorted(source.glob("*.py")), source / "generation_config.json"]:
                    if path.is_file():
                        shutil.copyfile(path, self.folder / path.name)
        return written

    def _write_index(self, bit_map: BitMap) -> WrittenCheckpoint:
        """Give the shards their final names and list what they hold."""
        files = self._name_shards()
        written = WrittenCheckpoint(
            files=files,
            num_tensors=len(self._shapes),
            nbytes=sum(shard.nbytes for shard in self._shards),
            total_parameters=self._count_parameters(bit_map),
        )
        weight_map = {
            name: file for file, shard in zip(files, self._shards, strict=True) for name in shard.names
        }
        totals = {"total_size": written.nbytes, "total_parameters": written.total_parameters}
        index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(self.folder / "model.safetensors.index.json", index)
        return written

    def _shard_for(self, nbytes: int) -> SafetensorsWriter:
        shard = self._shard
        if shard is not None and (shard.is_full or shard.nbytes + nbytes > self.max_shard_bytes):
            self._close_shard()
        if self._shard is None:
            path = self.folder / f"writing-{len(self._shards) + 1:05d}.safetensors"
            self._shard = SafetensorsWriter(path, {"format": "mlx"})
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shards.append(self._shard)
            self._shard = None

    def _name_shards(self) -> tuple[str, ...]:
        count = len(self._shards)
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for shard, name in zip(self._shards, names, strict=True):
            shard.path.rename(self.folder / name)
        return tuple(names)

    def _count_parameters(self, bit_map: BitMap) -> int:
        """Weights before packing; scales and biases of packed tensors are not weights."""
        total = 0
        for name, shape in self._shapes.items():
            path, _, leaf = name.rpartition(".")
            choice = bit_map.choices.get(path, KEEP)
            packed = choice.mode != "keep"
            if packed and leaf in {"scales", "biases"}:
                continue
            numel = 1
            for dimension in shape:
                numel *= dimension
            total += numel * 32 // choice.bits if packed and leaf == "weight" else numel
        return total

    def _write_config(self, config: dict[str, Any], bit_map: BitMap, keep_vision_config: bool) -> None:
        config = copy.deepcopy(config)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        quantization = quantization_config(bit_map)
        if quantization is not None:
            config["quantization"] = quantization
        # mlx-lm 0.32.0 has no such keyword, nor a family that needs it.
        keywords = {"keep_vision_config": True} if keep_vision_config else {}
        save_config(config, self.folder / "config.json", **keywords)


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Say of a failing file system what failed where."""
    try:
        yield
    except OSError as error:
        raise unwritable(error.filename or folder, error) from error


def _settings(choice: Choice) -> dict[str, Any]:
    return {"group_size": choice.group_size, "bits": choice.bits, "mode": choice.mode}
