"""Identify a set of weights without reading all of it."""

import hashlib
import json
import re
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import ModelError, ModelNotFound
from mlx_optiq_ext.types.metadata import IMPORT_FILE, ImportRecord
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = ["fingerprint", "other_weights", "weights_origin"]

_SAMPLES = 64
_SAMPLE_NBYTES = 4096


def fingerprint(ref: ModelRef) -> ModelFingerprint:
    """Hash config.json, every weight file's header and 64 evenly spaced samples of its data.

    Two checkpoints with the same fingerprint have the same tensors (names, shapes, types) and, but for
    changes that miss every sample, the same values.

    Raises:
        ModelNotFound: No config.json, or no safetensors file.
        ModelError: One of them is damaged.
    """
    folder = Path(ref.path)
    config_file = folder / "config.json"
    files = sorted(folder.glob("model*.safetensors"))
    if not config_file.is_file() or not files:
        raise ModelNotFound(f"{ref.source}: needs config.json and model*.safetensors in {folder}")
    config_bytes = config_file.read_bytes()
    digest = hashlib.sha256(config_bytes)
    for file in files:
        _add_file(digest, file)
    try:
        config = json.loads(config_bytes)
    except ValueError as error:
        raise ModelError(f"{config_file} is not JSON ({error}); download the model again") from error
    model_type = str(config.get("model_type", "unknown")) if isinstance(config, dict) else "unknown"
    return ModelFingerprint(
        model_type=model_type,
        sha256=digest.hexdigest(),
        source=ref.source,
        revision=ref.revision,
        origin=weights_origin(folder),
    )


def other_weights(made_for: ModelFingerprint, ref: ModelRef) -> str:
    """That something was made for other weights than these, in words; empty where it was made for these.

    Args:
        made_for: What the thing carries.
        ref: The weights it is used with.
    Raises:
        ModelNotFound, ModelError: As :func:`fingerprint`.
    """
    if made_for.sha256 == fingerprint(ref).sha256:
        return ""
    return f"was made for other weights ({made_for.source or 'unnamed'}) than those of {ref.source}"


def weights_origin(folder: Path) -> str:
    """What a reader should know of weights that ``optiq import-gguf`` wrote; empty for all others.

    Raises:
        ModelError: The folder's record of its import is damaged.
    """
    file = folder / IMPORT_FILE
    if not file.is_file():
        return ""
    try:
        record = msgspec.json.decode(file.read_bytes(), type=ImportRecord)
    except msgspec.MsgspecError as error:
        raise ModelError(
            f"{file} is no record of an import ({error}); delete it, or import the model again"
        ) from error
    total = sum(record.stored_types.values()) or 1
    ranked = sorted(record.stored_types.items(), key=lambda entry: (-entry[1], entry[0]))
    quantized = [(kind, numel) for kind, numel in ranked if re.match(r"I?Q\d", kind)]
    if not quantized:
        return f"imported from a GGUF file with unquantized weights ({', '.join(kind for kind, _ in ranked)})"
    kind, numel = quantized[0]
    bits = "".join(re.findall(r"\d", kind)[:1])
    share = "" if numel / total > 0.995 else f" ({100 * numel / total:.0f} % of them)"
    return (
        f"imported from a {kind} GGUF file: its weights{share} lie on a {bits}-bit grid already, "
        "and divergence is from these, not from the original ones"
    )


def _add_file(digest: "hashlib._Hash", file: Path) -> None:
    nbytes = file.stat().st_size
    with file.open("rb") as stream:
        header_nbytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_nbytes <= nbytes - 8:
            raise ModelError(f"{file} is cut off or no safetensors file; download the model again")
        digest.update(stream.read(header_nbytes))
        start = 8 + header_nbytes
        for k in range(_SAMPLES):
            stream.seek(start + (nbytes - start) * k // _SAMPLES)
            digest.update(stream.read(_SAMPLE_NBYTES))
