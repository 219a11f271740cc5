"""The fast correction: importance-weighted scales and biases for whole tensors.

Decides how a tensor is cut into chunks of rows and where they are worked: NumPy threads where MLX's device
is the CPU, MLX elsewhere. The numerics are in ``fit``, the layout in ``pack``. Knows nothing of models.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.quant.fit import Groups, fit_groups, nearest_codes
from mlx_optiq_ext.quant.float_fit import fit_float_groups
from mlx_optiq_ext.quant.pack import Packed, join_codes, pack_plain, require_finite, require_fit
from mlx_optiq_ext.quant.threads import in_threads
from mlx_optiq_ext.types.quant import Choice

__all__ = [
    "Coded",
    "fit_tensor",
    "join_coded",
    "on_cpu",
    "pack_coded",
    "pack_fast",
    "usable_importance",
]

_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24
_IMPORTANCE_FLOOR = 1e-6


class Coded(msgspec.Struct, frozen=True, kw_only=True):
    """Codes and parameters before packing; NumPy or MLX arrays."""

    codes: Any
    """(R, I) uint8, experts' rows one after the other."""
    groups: Groups
    """Parameters of shape (R, I/group_size), float32 holding values of the stored dtype; for the float modes
    the scale's bytes and a bias of zero."""


def pack_fast(weight: mx.array, choice: Choice, importance: mx.array, *, float_dtype: mx.Dtype) -> Packed:
    """Quantize with scales and biases fitted to what the inputs make of each weight's error.

    Never worse than :func:`pack_plain` in Σ_j a_j (ŵ_j − w_j)², group by group.

    Args:
        weight: (O, I) or (E, O, I), finite.
        choice: Affine choices get scales and biases fitted, the float modes the best of neighbouring scales.
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
    columns = usable_importance(importance, weight)
    return pack_coded(fit_tensor(weight, columns, plain, choice, float_dtype), plain, choice)


def usable_importance(importance: mx.array, weight: mx.array) -> mx.array:
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


def fit_tensor(
    weight: mx.array, importance: mx.array, plain: Packed, choice: Choice, dtype: mx.Dtype
) -> Coded:
    """Fit every group of a tensor, chunk by chunk of rows; experts become rows with their own importance."""
    in_numpy = on_cpu()
    xp: Any = np if in_numpy else mx
    width, group = weight.shape[-1], choice.group_size
    biases = mx.zeros_like(plain.scales) if plain.biases is None else plain.biases
    parts: list[Any] = [part.astype(mx.float32) for part in (weight, plain.scales, biases, importance)]
    require_finite(parts[0])
    if in_numpy:
        parts = [np.array(part) for part in parts]
    values = parts[0].reshape(-1, width // group, group)
    scale, bias = (part.reshape(-1, width // group) for part in parts[1:3])
    columns = parts[3].reshape(-1, width // group, group)
    rows_per_importance = values.shape[0] // columns.shape[0]
    chunk = max(1, (_CPU_CHUNK if in_numpy else _GPU_CHUNK) // width)

    def fit_rows(span: tuple[int, int]) -> Coded:
        rows = slice(*span)
        own = columns[span[0] // rows_per_importance][None]
        start = Groups(scale=scale[rows], bias=bias[rows])
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite error is never preferred
            if choice.mode == "affine":
                groups = fit_groups(values[rows], own, start, bits=choice.bits, dtype=dtype, xp=xp)
                codes = nearest_codes(values[rows], groups, (1 << choice.bits) - 1, xp)
            else:
                fitted = fit_float_groups(values[rows], own, start.scale, choice.mode, xp)
                groups, codes = Groups(scale=fitted.scale, bias=start.bias), fitted.codes
        codes = codes.astype(xp.uint8).reshape(-1, width)
        if not in_numpy:
            mx.eval(codes, groups.scale, groups.bias)
        return Coded(codes=codes, groups=groups)

    spans = _row_spans(values.shape[0], rows_per_importance, chunk)
    return join_coded(in_threads(fit_rows, spans) if in_numpy else [fit_rows(span) for span in spans], xp)


def join_coded(pieces: Sequence[Coded], xp: Any) -> Coded:
    """Stack ranges of rows in order."""
    return Coded(
        codes=xp.concatenate([piece.codes for piece in pieces]),
        groups=Groups(
            scale=xp.concatenate([piece.groups.scale for piece in pieces]),
            bias=xp.concatenate([piece.groups.bias for piece in pieces]),
        ),
    )


def pack_coded(coded: Coded, like: Packed, choice: Choice) -> Packed:
    """Pack codes into the shapes and dtypes of ``like``; evaluates."""
    weight = join_codes(coded.codes, choice.bits).reshape(like.weight.shape)
    scales = mx.array(coded.groups.scale).astype(like.scales.dtype).reshape(like.scales.shape)
    if like.biases is None:
        mx.eval(weight, scales)
        return Packed(weight=weight, scales=scales)
    biases = mx.array(coded.groups.bias).astype(like.biases.dtype).reshape(like.biases.shape)
    mx.eval(weight, scales, biases)
    return Packed(weight=weight, scales=scales, biases=biases)


def on_cpu() -> bool:
    """Whether MLX computes on the CPU, where NumPy on cache-sized chunks is ten times faster."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _row_spans(num_rows: int, rows_per_importance: int, chunk: int) -> list[tuple[int, int]]:
    """Row ranges of at most ``chunk`` rows that never straddle two importance vectors."""
    return [
        (low, min(low + chunk, first + rows_per_importance))
        for first in range(0, num_rows, rows_per_importance)
        for low in range(first, first + rows_per_importance, chunk)
    ]
