"""From a base and an adapter folder to a folder with both in one, and how much that changes.

Measures on held-out text what the adapter does to the base, and what storing the sum in the base's bits adds
to that. Called by ``optiq lora fuse``.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_unflatten

from mlx_optiq_ext.errors import FingerprintMismatch
from mlx_optiq_ext.formats.atomic import atomic_folder
from mlx_optiq_ext.hub.fingerprint import other_weights
from mlx_optiq_ext.lora.factors import Adapter
from mlx_optiq_ext.lora.files import locate_factors, read_adapter
from mlx_optiq_ext.lora.fuse import Store, fuse_modules
from mlx_optiq_ext.lora.layers import adapt_modules, base_of, set_factors
from mlx_optiq_ext.lora.residual import input_moments_of
from mlx_optiq_ext.lora.targets import choice_of
from mlx_optiq_ext.measure.calibration import load_windows
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.measure.records import Split
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.load import float_dtype, load_model, load_tokenizer
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import KEEP, BitMap

__all__ = ["FuseJob", "FuseResult", "fuse_folder"]

_SPLITS: tuple[Split, ...] = ("calibration", "held_out")
_WINDOW = 128
_LEFT_OUT = ("model*.safetensors", "model.safetensors.index.json", "README.md", ".gitattributes")


class FuseJob(msgspec.Struct, frozen=True, kw_only=True):
    """What is fused, and how it is stored."""

    base: ModelRef
    """The model that the adapter was trained on."""
    adapter: Path
    """Folder of any form that is read."""
    out: Path
    """Must not exist."""
    store: Store = "same"
    """same: the base's own bits; dense: adapted modules unquantized, all others as they are."""
    num_tokens: int = 1024
    """Tokens of calibration and of held-out text; 0 runs nothing and rounds plainly."""
    trust_remote_code: bool = False


class FuseResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was fused, and what it did to the output on held-out text."""

    folder: str
    store: Store
    num_modules: int
    nbytes: int
    change: float | None = None
    """KL(base with adapter ‖ base), nats per token: what the adapter changes. None where nothing was run."""
    added: float | None = None
    """KL(base with adapter ‖ fused), nats per token: what storing the sum adds."""
    added_stderr: float = 0.0
    num_windows: int = 0


def fuse_folder(job: FuseJob, progress: ProgressSink = ignore_progress) -> FuseResult:
    """Write a checkpoint that computes what base and adapter compute together.

    Args:
        job: What is fused, and where to.
        progress: Stages ``fit``, ``compare``, ``write``.
    Raises:
        FingerprintMismatch: The adapter was made for other weights.
        AdapterError: It does not fit the model.
        OutputExists: The output is there.
    """
    base, trust = job.base, job.trust_remote_code
    with atomic_folder(job.out) as working:
        read = read_adapter(job.adapter)
        made_for = read.config.base
        wrong = other_weights(made_for, base) if made_for is not None and made_for.sha256 else ""
        if wrong:
            raise FingerprintMismatch(f"{job.adapter} {wrong}; fuse it into its own base")
        model, config = load_model(base, trust_remote_code=trust)
        adapter = locate_factors(read, model)
        tokenizer = load_tokenizer(base, trust_remote_code=trust)
        windows = {split: _tokens(tokenizer, split, job.num_tokens) for split in _SPLITS}
        fused, numbers = _fuse(model, adapter, job.store, windows, float_dtype(model, config), progress)
        model.update_modules(tree_unflatten(list(fused.items())))
        nbytes = _write(working, model, config, base, tokenizer, progress)
    added = [after for _, after in numbers]
    return FuseResult(
        folder=str(job.out),
        store=job.store,
        num_modules=len(fused),
        nbytes=nbytes,
        change=float(np.mean([before for before, _ in numbers])) if numbers else None,
        added=float(np.mean(added)) if numbers else None,
        added_stderr=float(np.std(added, ddof=1) / len(added) ** 0.5) if len(added) > 1 else 0.0,
        num_windows=len(numbers),
    )


def _tokens(tokenizer: Any, split: Split, num_tokens: int) -> mx.array:
    if not num_tokens:
        return mx.zeros((0, _WINDOW), dtype=mx.int32)
    return mx.array(load_windows(tokenizer, split=split, num_tokens=num_tokens, window=_WINDOW).tokens)


def _fuse(
    model: nn.Module,
    adapter: Adapter,
    store: Store,
    windows: dict[Split, mx.array],
    dtype: mx.Dtype,
    progress: ProgressSink,
) -> tuple[dict[str, nn.Module], list[tuple[float, float]]]:
    """The fused modules, and per held-out window the divergences of base and fused model."""
    config, factors = adapter
    modules = dict(model.named_modules())
    bases = {path: modules[path] for path in factors}
    layers = adapt_modules(model, config.ranks, scale=config.scale)
    for path, layer in layers.items():
        set_factors(layer, factors[path])
        layer.scale = config.scale_of(path)
    model.eval()
    importance: dict[str, mx.array] = {}
    quantized = {path: base for path, base in bases.items() if choice_of(base) is not None}
    if store == "same" and quantized and windows["calibration"].shape[0]:
        progress(Progress(stage="fit", done=0, total=len(quantized)))
        importance = {
            path: mx.array(moments)
            for path, moments in input_moments_of(model, windows["calibration"], quantized).items()
        }
    _put(model, bases)
    fused = fuse_modules(model, adapter, store=store, importance=importance, float_dtype=dtype)
    numbers = []
    run: Any = model
    held_out = windows["held_out"]
    for window in range(held_out.shape[0]):
        progress(Progress(stage="compare", done=window, total=held_out.shape[0]))
        logits = []
        for chosen in (layers, bases, fused):
            _put(model, chosen)
            logits.append(run(held_out[window : window + 1]))
            mx.eval(logits[-1])
        with_adapter, plain, stored = logits
        numbers.append(
            (
                float(kl_divergence(with_adapter, plain).mean()),
                float(kl_divergence(with_adapter, stored).mean()),
            )
        )
        mx.clear_cache()
    assert all(base_of(layers[path]) is base for path, base in bases.items())
    return fused, numbers


def _put(model: nn.Module, modules: dict[str, Any]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))


def _write(
    working: Path,
    model: nn.Module,
    config: dict[str, Any],
    base: ModelRef,
    tokenizer: Any,
    progress: ProgressSink,
) -> int:
    writer = CheckpointWriter(working)
    arrays = named_arrays(model.parameters())
    for done, (name, array) in enumerate(arrays):
        progress(Progress(stage="write", done=done, total=len(arrays), detail=name))
        writer.add(name, array)
    choices = {
        path: choice_of(module) or KEEP
        for path, module in model.named_modules()
        if choice_of(module) is not None or hasattr(module, "to_quantized")
    }
    source = Path(base.path)
    written = writer.finish(
        config,
        BitMap(choices=choices),
        tokenizer=tokenizer,
        source=source,
        keep_vision_config="vision_tower" in getattr(model, "model", {}),
    )
    left_out = {path.name for pattern in _LEFT_OUT for path in source.glob(pattern)}
    for path in source.iterdir():
        if path.is_file() and path.name not in left_out and not (working / path.name).exists():
            shutil.copyfile(path, working / path.name)
    return written.nbytes
