"""From a base and an adapter folder to a folder with both in one, and how much that changes.

Measures on held-out text what the adapter does to the base, and what storing the sum in the base's bits adds
to that. Called by ``optiq lora fuse``.
"""

import shutil
from copy import copy
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
from mlx_optiq_ext.lora.layers import adapt_modules, set_factors
from mlx_optiq_ext.lora.residual import input_moments_of
from mlx_optiq_ext.lora.targets import choice_of
from mlx_optiq_ext.measure.calibration import load_windows
from mlx_optiq_ext.measure.divergence import kl_divergence
from mlx_optiq_ext.measure.records import Split
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.load import float_dtype, load_model, load_tokenizer
from mlx_optiq_ext.models.walk import get_module
from mlx_optiq_ext.quant.exact import make_exact
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import KEEP, BitMap

__all__ = ["FuseJob", "FuseResult", "fuse_folder"]

_REMEDY = "fuse with --num-tokens 0, which compares nothing"
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
        # What is written is never run: running casts weights.
        model, config = load_model(base, trust_remote_code=trust)
        adapter = locate_factors(read, model)
        tokenizer = load_tokenizer(base, trust_remote_code=trust)
        importance = _importance(job, adapter, tokenizer, progress)
        fused = fuse_modules(
            model, adapter, store=job.store, importance=importance, float_dtype=float_dtype(model, config)
        )
        numbers = _compare(job, adapter, fused, tokenizer, progress)
        _put(model, fused)
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
    return mx.array(load_windows(tokenizer, split=split, num_tokens=num_tokens, window=_WINDOW).tokens)


def _importance(
    job: FuseJob, adapter: Adapter, tokenizer: Any, progress: ProgressSink
) -> dict[str, mx.array]:
    """Second moments of what goes into the modules that will be packed again, adapter included."""
    if job.store == "dense" or not job.num_tokens:
        return {}
    model, _ = load_model(job.base, trust_remote_code=job.trust_remote_code)
    modules = {path: get_module(model, path) for path in adapter.factors}
    packed = {path: module for path, module in modules.items() if choice_of(module) is not None}
    if not packed:
        return {}
    progress(Progress(stage="fit", done=0, total=len(packed)))
    _adapt(model, adapter)
    moments = input_moments_of(model, _tokens(tokenizer, "calibration", job.num_tokens), packed)
    return {path: mx.array(values) for path, values in moments.items()}


def _compare(
    job: FuseJob, adapter: Adapter, fused: dict[str, nn.Module], tokenizer: Any, progress: ProgressSink
) -> list[tuple[float, float]]:
    """Per held-out window: KL(base with adapter ‖ base) and KL(base with adapter ‖ fused)."""
    if not job.num_tokens:
        return []
    model, _ = load_model(job.base, trust_remote_code=job.trust_remote_code)
    make_exact(model, "the base", remedy=_REMEDY)
    bases = {path: get_module(model, path) for path in adapter.factors}
    # Copies: what is written keeps its type.
    holder = nn.Module()
    holder.parts = [copy(module) for module in fused.values()]
    make_exact(holder, "the fused modules", remedy=_REMEDY)
    stored = dict(zip(fused, holder.parts, strict=True))
    layers = _adapt(model, adapter)
    held_out = _tokens(tokenizer, "held_out", job.num_tokens)
    run: Any = model
    numbers = []
    for window in range(held_out.shape[0]):
        progress(Progress(stage="compare", done=window, total=held_out.shape[0]))
        logits = []
        for modules in (layers, bases, stored):
            _put(model, modules)
            logits.append(run(held_out[window : window + 1]))
            mx.eval(logits[-1])
        before, after = (float(kl_divergence(logits[0], other).mean()) for other in logits[1:])
        numbers.append((before, after))
        mx.clear_cache()
    return numbers


def _adapt(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Put the adapter onto the model."""
    config, factors = adapter
    layers = adapt_modules(model, config.ranks, scale=config.scale)
    for path, layer in layers.items():
        set_factors(layer, factors[path])
        layer.scale = config.scale_of(path)
    model.eval()
    return layers


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
