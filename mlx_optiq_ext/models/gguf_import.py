"""Turn a GGUF file into a Hugging Face model folder.

Decodes every tensor to the wanted float type (what was quantized keeps the values it had there), renames
it, and rebuilds configuration and tokenizer. Knows nothing of where the folder goes: the caller gives an
empty one. Called by ``optiq import-gguf``.
"""

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import ResourceError, UsageError
from mlx_optiq_ext.models.gguf_family import FamilyPlan, PlannedTensor, plan_family
from mlx_optiq_ext.models.gguf_file import GgufFile, read_gguf
from mlx_optiq_ext.models.gguf_tokenizer import TokenizerFiles, rebuild_tokenizer
from mlx_optiq_ext.types.metadata import IMPORT_FILE, ImportRecord
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["GgufImport", "WeightDtype", "locate_gguf", "plan_import", "write_import"]

WeightDtype: TypeAlias = Literal["bfloat16", "float16", "float32"]

_ZIP_START = b"PK\x03\x04"
_SHARD_NBYTES = 2_000_000_000
_CHUNK_NUMEL = 1 << 22
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class GgufImport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known before the first weight is decoded."""

    file: GgufFile
    plan: FamilyPlan
    tokenizer: TokenizerFiles
    dtype: WeightDtype

    @property
    def numel(self) -> int:
        """Weights in all."""
        return sum(entry.source.numel for entry in self.plan.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights to be written."""
        return self.numel * _DTYPES[self.dtype].size

    @property
    def stored_types(self) -> dict[str, int]:
        """Weights per GGUF storage type."""
        counts: Counter[str] = Counter()
        for entry in self.plan.tensors:
            counts[entry.source.block_type.name] += entry.source.numel
        return dict(counts)


@contextlib.contextmanager
def locate_gguf(source: Path) -> Iterator[Path]:
    """Give the path of a GGUF file; one inside a wheel or zip is unpacked for the length of the block.

    Args:
        source: A .gguf file, or a zip archive that holds exactly one.
    Raises:
        UsageError: No such file, or not exactly one GGUF file inside the archive.
        ResourceError: The temporary folder has no room for it.
    """
    if not source.is_file():
        raise UsageError(f"{source}: no such file; give a .gguf file, or a wheel or zip with one inside")
    with source.open("rb") as file:
        is_archive = file.read(4) == _ZIP_START
    if not is_archive:
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="optiq-gguf-") as folder:
        yield _unpack(source, Path(folder))


def plan_import(path: Path, dtype: WeightDtype = "bfloat16") -> GgufImport:
    """Read the header of a GGUF file and decide everything; decodes no weights.

    Args:
        path: The GGUF file; it must stay in place until the weights are written.
        dtype: Float type of the written weights.
    Raises:
        UsageError: Not a readable GGUF file.
        UnsupportedModel: Its family, a tensor type or its tokenizer cannot be translated.
    """
    file = read_gguf(path)
    plan = plan_family(file)
    return GgufImport(file=file, plan=plan, tokenizer=rebuild_tokenizer(file), dtype=dtype)


def write_import(job: GgufImport, folder: Path, *, progress: ProgressSink = ignore_progress) -> None:
    """Write weights, configuration and tokenizer into an existing, empty folder.

    Args:
        job: From :func:`plan_import`.
        folder: Where the files go; the caller makes the whole step atomic.
        progress: One event per tensor.
    Cost: memory for one shard (2 GB) and one chunk of float32.
    """
    _write_weights(job, folder, progress)
    special = job.tokenizer.special
    ends = [index for index in (special.end_of_turn, special.eos) if index is not None]
    ids: dict[str, Any] = {
        "bos_token_id": special.bos,
        "eos_token_id": ends[0] if len(set(ends)) == 1 else sorted(set(ends)),
        "pad_token_id": special.pad,
    }
    ids = {key: value for key, value in ids.items() if value not in (None, [])}
    _write_json(folder / "config.json", job.plan.config | ids | {"torch_dtype": job.dtype})
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer.json", job.tokenizer.tokenizer)
    _write_json(folder / "tokenizer_config.json", job.tokenizer.tokenizer_config)
    _write_json(folder / "special_tokens_map.json", job.tokenizer.special_tokens_map)
    record = ImportRecord(
        package_version=__version__,
        file=job.file.path.name,
        stored_types=job.stored_types,
        dtype=job.dtype,
    )
    _write_json(folder / IMPORT_FILE, msgspec.to_builtins(record))
    (folder / "README.md").write_text(_readme(job), encoding="utf-8")


def _unpack(archive_path: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of an archive into ``folder``."""
    try:
        with zipfile.ZipFile(archive_path) as archive:
            members = [info for info in archive.infolist() if info.filename.lower().endswith(".gguf")]
            if len(members) != 1:
                names = ", ".join(info.filename for info in members) or "none"
                raise UsageError(
                    f"{archive_path}: an archive must hold exactly one .gguf file, found {names}; unpack it"
                    " and give the file itself"
                )
            needed, free = members[0].file_size, shutil.disk_usage(folder).free
            if needed > free:
                raise ResourceError(
                    f"unpacking {members[0].filename} needs {needed / 1e9:.2f} GB in {folder.parent}, which"
                    f" has {free / 1e9:.2f} GB free; set TMPDIR to a larger disk or unpack it yourself"
                )
            unpacked = folder / Path(members[0].filename).name
            with archive.open(members[0]) as stored, unpacked.open("wb") as file:
                shutil.copyfileobj(stored, file, length=1 << 20)
    except zipfile.BadZipFile as error:
        raise UsageError(f"{archive_path}: damaged archive ({error}); download it again") from error
    return unpacked


def _write_weights(job: GgufImport, folder: Path, progress: ProgressSink) -> None:
    """Write the shards and, for more than one, their index."""
    shards = _shards(job)
    weight_map: dict[str, str] = {}
    done = 0
    for number, entries in enumerate(shards, start=1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        arrays: dict[str, mx.array] = {}
        for entry in entries:
            arrays[entry.name] = _read_tensor(job.file, entry, job.dtype)
            weight_map[entry.name] = name
            done += 1
            progress(Progress(stage="import", done=done, total=len(job.plan.tensors), detail=entry.name))
        mx.save_safetensors(str(folder / name), arrays, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": job.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(job: GgufImport) -> list[list[PlannedTensor]]:
    """Tensors in file order, grouped so that no group passes the shard size unless one tensor does."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for entry in job.plan.tensors:
        nbytes = entry.source.numel * _DTYPES[job.dtype].size
        if shards[-1] and filled + nbytes > _SHARD_NBYTES:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes
    return shards


def _read_tensor(file: GgufFile, entry: PlannedTensor, dtype: WeightDtype) -> mx.array:
    """Decode one tensor in chunks of blocks; evaluated, in the wanted type and layout."""
    blocks = file.raw(entry.source)
    step = _CHUNK_NUMEL // entry.source.block_type.numel
    chunks: list[mx.array] = []
    for start in range(0, len(blocks), step):
        values = entry.source.block_type.decode(blocks[start : start + step]).reshape(-1)
        if not np.isfinite(values).all():
            raise UsageError(
                f"{file.path.name}: tensor {entry.source.name} holds non-finite weights; "
                "the file is damaged, download it again"
            )
        chunks.append(_cast(values - 1 if entry.change == "minus_one" else values, dtype))
    whole = chunks[0] if len(chunks) == 1 else mx.concatenate(chunks)
    weight = whole.reshape(entry.source.shape)
    if entry.change == "rotary_order":
        weight = _halves_order(weight, entry.num_heads)
    mx.eval(weight)
    return weight


def _cast(values: npt.NDArray[np.float32], dtype: WeightDtype) -> mx.array:
    array = mx.array(values).astype(_DTYPES[dtype])
    mx.eval(array)
    return array


def _halves_order(weight: mx.array, num_heads: int) -> mx.array:
    """Rows of each head from interleaved pairs (0,1,0,1,…) to halves (0,0,…,1,1,…); shape (O, I) or (O,)."""
    shape = weight.shape
    pairs = weight.reshape(num_heads, shape[0] // num_heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(job: GgufImport) -> str:
    """A short card: where the weights came from and what that means."""
    metadata = job.file.metadata
    licence = metadata.get("general.license")
    name = metadata.get("general.name") or job.file.path.stem
    stored = ", ".join(f"{kind} {numel:,}" for kind, numel in sorted(job.stored_types.items()))
    front = f"license: {licence}\n" if isinstance(licence, str) else ""
    return (
        f"---\n{front}library_name: transformers\n---\n\n# {name}\n\n"
        f"Imported from `{job.file.path.name}` with `optiq import-gguf`, weights as {job.dtype}.\n"
        f"Stored weights per GGUF type: {stored}.\n\n"
        "Weights that were quantized in the GGUF file keep the values they had there; nothing is restored.\n"
    )
