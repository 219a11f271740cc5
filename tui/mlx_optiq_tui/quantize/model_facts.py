"""What is known of a model before it is measured: weights, bytes, architecture; from headers and config.json.

Reads no weights. Called by the quantize screen.
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.allocate.kv_memory import kv_bytes_per_token
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.hub.resolve import check_model_folder
from mlx_optiq_ext.hub.search import FoundModel, fetch_config

__all__ = ["ModelFacts", "facts_of_folder", "facts_of_found"]

_FLOATS = ("BF16", "F16", "F32")
_CONTEXTS = ("max_position_embeddings", "max_sequence_length", "n_positions", "max_seq_len", "seq_length")


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    source: str
    """Folder or Hub id: what commands are given."""
    numel: int
    """All weights; 0 where unknown."""
    nbytes: int = 0
    """Of the weight files; 0 where unknown."""
    float_bits: int = 16
    cache_bits: float = 0.0
    """Stored bits per cached number; 0: as wide as the model's floats."""
    config: dict[str, Any] = {}
    is_quantized: bool = False
    """Stored in fewer bits already: nothing to measure against."""

    @property
    def name(self) -> str:
        """Short name, for files and titles."""
        return Path(self.source).name

    @property
    def context(self) -> int:
        """Tokens that the model was made for; 0 where the config does not say."""
        text = {**self.config, **(self.config.get("text_config") or {})}
        value = next((text[key] for key in _CONTEXTS if isinstance(text.get(key), int)), 0)
        return max(int(value), 0)

    def cache_nbytes(self, context: int) -> int | None:
        """KV cache of so many tokens; None where the config does not tell.

        Args:
            context: At least 1.
        """
        per_token = kv_bytes_per_token(self.config, context, float_bits=self.float_bits)
        if per_token is None:
            return None
        bits = self.cache_bits or self.float_bits
        return math.ceil(per_token * context * bits / self.float_bits)

    @property
    def architecture(self) -> str:
        """Family, blocks and width, where the config says them."""
        text = {**self.config, **(self.config.get("text_config") or {})}
        parts = [str(self.config.get("model_type", ""))]
        for word, keys in (("blocks", ("num_hidden_layers", "n_layers")), ("wide", ("hidden_size", "dim"))):
            value = next((text[key] for key in keys if isinstance(text.get(key), int)), None)
            parts += [f"{value} {word}"] if value else []
        return ", ".join(part for part in parts if part)


def facts_of_folder(folder: Path) -> ModelFacts:
    """Read the headers of a model's folder.

    Raises:
        ModelNotFound: It is not a whole model; says what is missing.
        UsageError: A weight file is damaged.
    """
    folder = folder.expanduser()
    check_model_folder(folder)
    config = json.loads((folder / "config.json").read_bytes())
    tensors = read_folder(folder).values()
    by_type = dict.fromkeys(_FLOATS, 0)
    for tensor in tensors:
        if tensor.dtype in by_type:
            by_type[tensor.dtype] += math.prod(tensor.shape)
    is_quantized = "quantization" in config or "quantization_config" in config
    return ModelFacts(
        source=str(folder),
        numel=0 if is_quantized else sum(math.prod(tensor.shape) for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        float_bits=32 if by_type["F32"] > by_type["BF16"] + by_type["F16"] else 16,
        config=config,
        is_quantized=is_quantized,
    )


def facts_of_found(found: FoundModel) -> ModelFacts:
    """What the Hub, or the cache, says of a model; asks the network.

    Raises:
        ModelNotFound: No access, no connection, or no usable config.json.
    """
    config = fetch_config(found.repo_id)
    return ModelFacts(
        source=found.repo_id,
        numel=found.numel,
        float_bits=32 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 16,
        config=config,
        is_quantized="quantization" in config or "quantization_config" in config,
    )
