"""Load models through mlx-lm, lazily, and say early when that cannot work.

The one file of this package that imports loading names of mlx-lm. Called by ``quant`` and ``eval``.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as _load_tokenizer

from mlx_optiq_ext.errors import ModelError, ModelNotFound, UnsupportedModel
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.types.model import ModelRef

__all__ = [
    "cast_floats",
    "compute_dtype",
    "float_dtype",
    "load_model",
    "load_tokenizer",
    "resident_nbytes",
]

_FLOATS = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def load_model(ref: ModelRef, *, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Build the module tree of a checkpoint with lazy weights: nothing is read until it is evaluated.

    Returns:
        The model in evaluation mode and its config.json as a dict.
    Raises:
        ModelNotFound: The folder has no config or no weights.
        ModelError: A weight file is damaged.
        UnsupportedModel: mlx-lm has no such family, or weights and module tree do not agree.
    """
    try:
        model, config = mlx_lm_utils.load_model(
            Path(ref.path), lazy=True, strict=True, trust_remote_code=trust_remote_code
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFound(
            f"{ref.source}: {error}; the folder needs config.json and model*.safetensors"
        ) from error
    except RuntimeError as error:  # what mlx raises for a file it cannot read
        named = _unreadable(Path(ref.path)) or ref.source
        raise ModelError(f"{named}: {error}; download the model again") from error
    except (ValueError, KeyError, AttributeError, TypeError, ModuleNotFoundError, SystemExit) as error:
        raise UnsupportedModel(
            f"{ref.source}: mlx-lm cannot build this model ({type(error).__name__}: {error}); "
            "check that `mlx_lm.generate` runs it, or update mlx-lm"
        ) from error
    return model, config


def _unreadable(folder: Path) -> str:
    """The first weight file whose header cannot be read; empty where all can."""
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            mx.load(str(file))
        except RuntimeError:
            return str(file)
    return ""


def load_tokenizer(ref: ModelRef, *, trust_remote_code: bool = False) -> TokenizerWrapper:
    """Load the tokenizer that belongs to a checkpoint.

    Raises:
        UnsupportedModel: The folder has no tokenizer that transformers can load.
    """
    try:
        return _load_tokenizer(
            Path(ref.path), tokenizer_config_extra={"trust_remote_code": trust_remote_code}
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UnsupportedModel(
            f"{ref.source}: no usable tokenizer ({error}); the folder needs tokenizer.json and "
            "tokenizer_config.json"
        ) from error


def float_dtype(model: nn.Module, config: dict[str, Any], wanted: str = "auto") -> mx.Dtype:
    """Type of unquantized tensors, scales and biases in the checkpoint that will be written.

    ``auto`` follows stock ``mlx_lm.convert``: the config's dtype where it names a float type, else the
    type that most weights have.
    """
    if wanted != "auto":
        return _FLOATS[wanted]
    text = config.get("text_config") or {}
    for name in (config.get("torch_dtype"), config.get("dtype"), text.get("dtype"), text.get("torch_dtype")):
        if name in _FLOATS:
            return _FLOATS[name]
    counts: dict[mx.Dtype, int] = {}
    for _, array in _leaves(model):
        if mx.issubdtype(array.dtype, mx.floating):
            counts[array.dtype] = counts.get(array.dtype, 0) + array.size
    return max(counts, key=lambda dtype: counts[dtype]) if counts else mx.bfloat16


def compute_dtype() -> mx.Dtype:
    """Type to measure in: float32 on every back end, so that the numbers do not depend on the machine.

    Half-precision matmul on CPUs is inexact, and gradients of many blocks lose more than the errors that
    are to be told apart; a model whose weights do not fit in float32 is streamed.
    """
    return mx.float32


def cast_floats(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast every float parameter that the family allows to be cast; lazy, in place.

    A family's ``cast_predicate`` names parameters that keep their type (as in stock ``mlx_lm.convert``);
    it is not asked where ``dtype`` is float32, which loses nothing.
    """
    allowed = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        wanted = mx.issubdtype(array.dtype, mx.floating) and (dtype == mx.float32 or allowed(path))
        return array.astype(dtype) if wanted else array

    model.update(tree_map_with_path(cast, model.parameters()))


def resident_nbytes(model: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes that all parameters take once evaluated in ``dtype``."""
    return sum(
        array.size * (dtype.size if mx.issubdtype(array.dtype, mx.floating) else array.dtype.size)
        for _, array in _leaves(model)
    )


def _leaves(model: nn.Module) -> list[tuple[str, mx.array]]:
    return named_arrays(model.parameters())
