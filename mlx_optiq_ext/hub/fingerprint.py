"""Identify a set of weights without reading all of it."""

import hashlib
import json
from pathlib import Path

from mlx_optiq_ext.errors import ModelError, ModelNotFound
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = ["fingerprint"]

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
        model_type=model_type, sha256=digest.hexdigest(), source=ref.source, revision=ref.revision
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
