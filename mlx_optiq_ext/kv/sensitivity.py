"""How much the output changes when one layer's keys or values are stored in fewer bits.

One recorded forward pass and one reverse pass per label sample estimate every choice of every tensor, as for
weights: ½ Σ g²·e², with the gradient g and the rounding error e of every cached number, in the coordinates
in which it is stored. Called by ``convert.kv_cache``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import MeasurementError, UnsupportedModel
from mlx_optiq_ext.kv.build import encode_mean
from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.gradients import CacheReverse, cache_tape, tensor_name
from mlx_optiq_ext.kv.observe import CacheMap
from mlx_optiq_ext.measure.fisher import sampled_label_gradient
from mlx_optiq_ext.models.taps import Capture
from mlx_optiq_ext.types.kv import KVProbe, KVSite, KVTensor
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import AFFINE_BITS, AFFINE_GROUPS, KEEP, Choice

__all__ = ["CacheEstimates", "EstimateSettings", "KVTokens", "choices_for", "estimate_divergences"]

Floats = NDArray[np.float64]


class KVTokens(NamedTuple):
    """Windows of one prefix length."""

    length: int
    tokens: NDArray[np.int32]
    """(W, length)."""


class EstimateSettings(NamedTuple):
    """How keys and values are measured."""

    rotate: bool = True
    """Centre keys, rotate keys and values."""
    samples: int = 1
    """Sampled labels per position."""
    seed: int = 0
    """Of the labels."""
    values_rotated: tuple[int, ...] = ()
    """Blocks whose weights make rotated values already; theirs are measured as they come."""


class CacheEstimates(NamedTuple):
    """What was measured of every tensor."""

    probes: tuple[KVProbe, ...]
    key_means: tuple[str, ...]
    """Per site, see :attr:`KVLayer.key_mean`."""
    silent: tuple[str, ...]
    """Tensors whose gradient is exactly zero: they act through a choice, which no derivative sees. Only keep
    is left to them."""


def choices_for(
    dim: int, bits: Sequence[int] = AFFINE_BITS, groups: Sequence[int] = AFFINE_GROUPS
) -> tuple[Choice, ...]:
    """Storages that a head of ``dim`` numbers allows, in ascending stored bits; keep is the last."""
    found = [Choice(bits=b, group_size=g) for b in bits for g in groups if dim % g == 0]
    return (*sorted(found, key=lambda choice: (choice.bpw(), choice)), KEEP)


def estimate_divergences(
    model: nn.Module,
    caches: CacheMap,
    text: Sequence[KVTokens],
    candidates: Mapping[tuple[str, KVTensor], Sequence[Choice]],
    settings: EstimateSettings,
    progress: ProgressSink = ignore_progress,
) -> CacheEstimates:
    """Estimate the divergence of every choice of every tensor at every prefix length.

    Args:
        model: Weights resident, float32 where the back end needs it.
        caches: From ``observe``.
        text: Windows by length; the mean over lengths is what is allocated for.
        candidates: Choices by (site name, tensor).
        settings: How to measure.
        progress: Stages ``forward`` and ``measure``.
    Raises:
        MeasurementError: Gradients are not finite, or a block gave none at all.
        UnsupportedModel: Blocks read the content of other blocks' caches.
    Cost: per length one forward, and per sample one recomputation and one backward, one block in memory.
    """
    rotate, samples, seed, folded = settings
    sums: dict[tuple[str, KVTensor], list[Floats]] = {}
    means = _KeyMeans()
    for number, windows in enumerate(text):
        for site, tensor, captures in _captured(model, caches, windows, samples, seed + number, progress):
            key = (site.name, tensor)
            codec_mean = means.of(site, captures) if rotate and tensor == "k" else None
            dim, rotated = captures[0].g.shape[-1], tensor == "v" and site.layer in folded
            costs = [
                _divergence(captures, Codec(choice, dim, rotate=rotate, mean=codec_mean, rotated=rotated))
                for choice in candidates[key]
            ]
            sums.setdefault(key, []).append(np.array(costs))
    probes, silent = [], []
    for site in caches.sites:
        for tensor in ("k", "v"):
            key = (site.name, tensor)
            if key not in sums:
                raise MeasurementError(
                    f"cache {site.name}: no block of the model filled it in the recorded pass; "
                    "leave this cache in full precision"
                )
            is_silent = not any(windows.any() for windows in sums[key])
            if is_silent and set(candidates[key]) != {KEEP}:
                silent.append(tensor_name(site, tensor))
            probes += [
                _probe(site, tensor, choice, [windows[row] for windows in sums[key]])
                for row, choice in enumerate(candidates[key])
                if choice == KEEP or not is_silent
            ]
    key_means = tuple(encode_mean(means.found[site.name]) for site in caches.sites) if rotate else ()
    return CacheEstimates(tuple(probes), key_means, tuple(silent))


class _KeyMeans:
    """Mean key per head; the first length measured decides, so that all are rounded alike."""

    def __init__(self) -> None:
        self.found: dict[str, mx.array] = {}

    def of(self, site: KVSite, captures: list[Capture]) -> mx.array:
        if site.name not in self.found:
            total = sum((c.call.x.astype(mx.float32).sum(axis=(0, 2)) for c in captures), mx.array(0.0))
            count = sum(c.call.x.shape[0] * c.call.x.shape[2] for c in captures)
            mean = (total / count).astype(mx.float16).astype(mx.float32)
            mx.eval(mean)
            self.found[site.name] = mean
        return self.found[site.name]


def _captured(
    model: nn.Module,
    caches: CacheMap,
    windows: KVTokens,
    samples: int,
    seed: int,
    progress: ProgressSink,
) -> Iterator[tuple[KVSite, KVTensor, list[Capture]]]:
    """Every tensor of every cache with its gradient, all windows together."""
    tape, switch = cache_tape(model, caches, mx.array(windows.tokens))
    detail, total = f"{windows.length} tokens", len(tape.blocks)
    try:
        tape.forward(lambda done: progress(Progress(stage="forward", done=done, total=total, detail=detail)))
    except AttributeError as error:
        raise UnsupportedModel(
            f"{type(model).__module__}: blocks reach into each other's caches ({error}), so what one of them "
            "stores cannot be measured alone; write a kv_config.json by hand and try it with "
            "`optiq score --kv-config`"
        ) from error

    def cotangent(item: int, logits: mx.array) -> mx.array:
        return sampled_label_gradient(logits, mx.random.key(seed * 1_000_003 + item))

    by_name: dict[str, tuple[KVSite, KVTensor]] = {}
    for site in caches.sites:
        by_name[tensor_name(site, "k")] = (site, "k")
        by_name[tensor_name(site, "v")] = (site, "v")
    for done, captured in enumerate(CacheReverse(tape, switch, cotangent, samples).run(), 1):
        found: dict[str, list[Capture]] = {}
        for captures in captured.items:
            for capture in captures:
                found.setdefault(capture.call.path, []).append(capture)
        captured.items.clear()
        for name, captures in found.items():
            site, tensor = by_name[name]
            yield site, tensor, captures
        found.clear()
        mx.clear_cache()
        progress(Progress(stage="measure", done=min(done, total), total=total, detail=detail))


def _divergence(captures: list[Capture], codec: Codec) -> list[float]:
    """½ Σ g²·e² per position, one number per window (and label sample); evaluates."""
    costs = []
    for capture in captures:
        if not codec.is_packed:
            costs.append(mx.array(0.0))
            continue
        stored = codec.transform(capture.call.x.astype(mx.float32))
        error = codec.unpack(codec.pack(stored)) - stored
        gradient = codec.turn(capture.g.astype(mx.float32)) * codec.product_scale
        costs.append(0.5 * mx.sum(mx.square(gradient * error)) / stored.shape[2])
    values = mx.stack(costs)
    mx.eval(values)
    found: list[float] = np.array(values).tolist()
    if not np.isfinite(found).all():
        raise MeasurementError(
            f"{captures[0].call.path}: gradients or rounding errors are not finite; measure in float32"
        )
    return found


def _probe(site: KVSite, tensor: KVTensor, choice: Choice, lengths: list[Floats]) -> KVProbe:
    by_length = tuple(float(windows.mean()) for windows in lengths)
    variances = [float(w.var(ddof=1)) / len(w) for w in lengths if len(w) > 1]
    return KVProbe(
        index=site.index,
        member=site.member,
        tensor=tensor,
        choice=choice,
        divergence=float(np.mean(by_length)),
        stderr=float(np.sqrt(sum(variances))) / len(lengths) if variances else 0.0,
        by_length=by_length,
    )
