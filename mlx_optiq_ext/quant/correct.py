"""Better rounding, stored as ordinary MLX tensors: plain, fast (weighted fit) and full (GPTQ with that fit).

Decides how a whole tensor is chunked and on which device it is worked; the numerics are in ``fit`` and
``gptq``, the layout in ``pack``. Called by the measurement (errors must be those of the corrected weights)
and by the checkpoint writer. Knows nothing of models or files.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import mlx.core as mx
import msgspec
import numpy as np

from mlx_optiq_ext.errors import MeasurementError, UsageError
from mlx_optiq_ext.quant.fit import Groups, fit_groups, nearest_codes
from mlx_optiq_ext.quant.pack import Packed, join_codes, pack_plain, require_finite, require_fit, unpack
from mlx_optiq_ext.types.quant import Choice

__all__ = ["Level", "Packed", "pack", "pack_fast", "pack_plain", "unpack", "weighted_error"]

Level = Literal["none", "fast", "full"]

_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
_IMPORTANCE_FLOOR = 1e-6


class Coded(msgspec.Struct, frozen=True, kw_only=True):
    """Codes and parameters before packing; NumPy or MLX arrays."""

    codes: Any
    """(R, I) uint8."""
    groups: Groups
    """Parameters of shape (R, I/group_size), float32 holding values of the stored dtype."""


def pack(
    weight: mx.array,
    choice: Choice,
    *,
    level: Level,
    float_dtype: mx.Dtype,
    importance: mx.array | None = None,
) -> Packed:
    """Quantize one tensor at a correction level.

    Args:
        weight: (O, I) or (E, O, I).
        choice: How to store it; any but keep.
        level: none = :func:`pack_plain`, fast = :func:`pack_fast`, full = ``pack_full``.
        float_dtype: Stored type of affine scales and biases.
        importance: E[x_j²] of the inputs, (I,) or (E, I); needed for fast.
    Raises:
        UsageError: A statistic that the level needs is missing.
    """
    if level == "none":
        return pack_plain(weight, choice, float_dtype=float_dtype)
    if importance is None:
        raise UsageError(f"correction {level!r} needs the input second moments; measure them or use 'none'")
    return pack_fast(weight, choice, importance, float_dtype=float_dtype)


def pack_fast(weight: mx.array, choice: Choice, importance: mx.array, *, float_dtype: mx.Dtype) -> Packed:
    """Quantize with scales and biases fitted to what the inputs make of each weight's error.

    Never worse than :func:`pack_plain` in :func:`weighted_error`, group by group.

    Args:
        weight: (O, I) or (E, O, I), finite.
        choice: Affine choices are fitted; the float modes are stored as :func:`pack_plain` does.
        importance: a_j = E[x_j²] ≥ 0, shape (I,) or (E, I).
        float_dtype: Stored type of scales and biases.
    Returns:
        Evaluated arrays.
    Raises:
        ModelError: The weight holds NaN or infinity.
        MeasurementError: ``importance`` is not finite, negative or of the wrong shape.
    Cost: about 20 passes over the weight; on CPU in NumPy on all cores, elsewhere on MLX's device.
    """
    require_fit(weight, choice)
    plain = pack_plain(weight, choice, float_dtype=float_dtype)
    if plain.biases is None:
        require_finite(weight)
        return plain
    columns = _usable_importance(importance, weight)
    coded = _fit_tensor(weight, columns, plain, choice, float_dtype)
    packed_weight = join_codes(coded.codes, choice.bits).reshape(plain.weight.shape)
    scales, biases = (
        mx.array(part).astype(float_dtype).reshape(plain.scales.shape)
        for part in (coded.groups.scale, coded.groups.bias)
    )
    mx.eval(packed_weight, scales, biases)
    return Packed(weight=packed_weight, scales=scales, biases=biases)


def weighted_error(weight: mx.array, packed: Packed, choice: Choice, importance: mx.array) -> mx.array:
    """Σ_ij a_j (ŵ_ij − w_ij)², float32 scalar, lazy: what :func:`pack_fast` minimises."""
    error = unpack(packed, choice) - weight.astype(mx.float32)
    columns = importance.astype(mx.float32)
    return (error * error * (columns[:, None, :] if columns.ndim == 2 else columns)).sum()


def _usable_importance(importance: mx.array, weight: mx.array) -> mx.array:
    """Importance as float32, (I,) or (E, I), mean 1 and nowhere zero."""
    wanted: list[tuple[int, ...]] = [(weight.shape[-1],)]
    if weight.ndim == 3:
        wanted.append((weight.shape[0], weight.shape[-1]))
    if tuple(importance.shape) not in wanted:
        raise MeasurementError(
            f"importance of shape {tuple(importance.shape)} does not belong to a weight of shape "
            f"{tuple(weight.shape)}; expected {' or '.join(map(str, wanted))}"
        )
    columns = importance.astype(mx.float32)
    if not bool((mx.isfinite(columns) & (columns >= 0)).all().item()):
        raise MeasurementError("importance holds negative or non-finite values; measure the inputs again")
    mean = columns.mean(-1, keepdims=True)
    scaled = mx.where(mean > 0, columns / mx.where(mean > 0, mean, 1.0), 1.0)
    return mx.maximum(scaled, _IMPORTANCE_FLOOR)


def _fit_tensor(
    weight: mx.array, importance: mx.array, plain: Packed, choice: Choice, dtype: mx.Dtype
) -> Coded:
    """Fit every group of a tensor, chunk by chunk of rows; experts become rows with their own importance."""
    assert plain.biases is not None
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    xp: Any = np if on_cpu else mx
    width, group = weight.shape[-1], choice.group_size
    parts: list[Any] = [weight, plain.scales, plain.biases, importance]
    parts = [part.astype(mx.float32) for part in parts]
    require_finite(parts[0])
    if on_cpu:
        parts = [np.array(part) for part in parts]
    values = parts[0].reshape(-1, width // group, group)
    scale, bias = (part.reshape(-1, width // group) for part in parts[1:3])
    columns = parts[3].reshape(-1, width // group, group)
    rows_per_importance = values.shape[0] // columns.shape[0]
    chunk = max(1, (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // width)

    def fit_rows(span: tuple[int, int]) -> Coded:
        rows = slice(*span)
        own = columns[span[0] // rows_per_importance][None]
        start = Groups(scale=scale[rows], bias=bias[rows])
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite error is never preferred
            groups = fit_groups(values[rows], own, start, bits=choice.bits, dtype=dtype, xp=xp)
        codes = nearest_codes(values[rows], groups, (1 << choice.bits) - 1, xp).astype(xp.uint8)
        if not on_cpu:
            mx.eval(codes, groups.scale, groups.bias)
        return Coded(codes=codes.reshape(-1, width), groups=groups)

    spans = _spans(values.shape[0], rows_per_importance, chunk)
    if on_cpu and len(spans) > 1:
        with ThreadPoolExecutor(min(len(spans), os.cpu_count() or 1)) as pool:
            pieces = list(pool.map(fit_rows, spans))
    else:
        pieces = [fit_rows(span) for span in spans]
    return Coded(
        codes=xp.concatenate([piece.codes for piece in pieces]),
        groups=Groups(
            scale=xp.concatenate([piece.groups.scale for piece in pieces]),
            bias=xp.concatenate([piece.groups.bias for piece in pieces]),
        ),
    )


def _spans(num_rows: int, rows_per_importance: int, chunk: int) -> list[tuple[int, int]]:
    """Row ranges of at most ``chunk`` rows that never straddle two importance vectors."""
    return [
        (low, min(low + chunk, first + rows_per_importance))
        for first in range(0, num_rows, rows_per_importance)
        for low in range(first, first + rows_per_importance, chunk)
    ]
