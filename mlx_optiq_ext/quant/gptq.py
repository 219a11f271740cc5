"""Rounding with error feedback: each column is rounded knowing what the columns before it did to the output.

Minimises e·G·e per row, e being the row's error and G = E[x xᵀ] of the inputs, over codes, scales and biases
of plain MLX groups. Arrays are NumPy or MLX float32 (``xp``). Knows nothing of layouts, experts or files;
called by ``correct`` for chunks of rows of one matrix.
"""

from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.quant.fit import Array, Groups, edge_groups, fit_groups, round_stored

__all__ = ["Codes", "Feedback", "feedback_rows", "prepare_feedback", "refine_rows", "row_losses"]

# Measured on held-out text: 0.3 is best for 15,000 calibration tokens, 1 to 3 for 1,000; flat around it.
_DAMPING = 0.5
_SWEEPS = 2
_TINY = 1e-30


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """A Gram made ready: damped, factored as M·Mᵀ with M upper triangular, M's columns scaled to M_jj = 1."""

    gram: Array
    """(I, I) damped Gram."""
    spread: Array
    """(I, I) M_ij / M_jj: how the error of column i moves the target of column j > i."""
    pivots: Array
    """(I,) M_jj²: what the error of column j costs once later columns have adapted."""


class Codes(msgspec.Struct, frozen=True, kw_only=True):
    """Rounded rows, columns first: codes (I, R) as float32 integers, scale and bias (G, R)."""

    codes: Array
    scale: Array
    bias: Array

    def values(self) -> Array:
        """The numbers they stand for, (I, R)."""
        num_groups, num_rows = self.scale.shape
        grouped = self.codes.reshape(num_groups, -1, num_rows)
        return (grouped * self.scale[:, None] + self.bias[:, None]).reshape(-1, num_rows)


def prepare_feedback(gram: npt.NDArray[np.floating[Any]], xp: Any, damping: float = _DAMPING) -> Feedback:
    """Damp and factor a Gram.

    The damping (``damping`` × the median diagonal) stands for inputs that the calibration text lacks; the
    median keeps a few outlier columns from drowning all others in it.

    Args:
        gram: (I, I) symmetric, positive semi-definite; rank-deficient is fine.
        xp: Where the parts go: ``numpy`` or ``mlx.core``.
    Raises:
        MeasurementError: The Gram has a clearly negative eigenvalue.
    Cost: one float64 Cholesky, I³/3 multiplications, on the CPU.
    """
    damped = np.array(gram, dtype=np.float64)
    diagonal = np.diag(damped)
    typical = float(np.median(diagonal)) or float(diagonal.mean()) or 1.0
    damped /= typical
    damped[np.diag_indices_from(damped)] += damping
    # Cholesky of the matrix read backwards gives the upper-triangular factor.
    try:
        factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise MeasurementError(
            f"a Gram of {damped.shape[0]} inputs is not positive semi-definite; measure the inputs again"
        ) from error
    pivots = np.diag(factor)
    parts: list[Array] = [
        np.ascontiguousarray(part, dtype=np.float32) for part in (damped, factor / pivots, pivots**2)
    ]
    if xp is mx:
        parts = [mx.array(part) for part in parts]
    return Feedback(gram=parts[0], spread=parts[1], pivots=parts[2])


def feedback_rows(
    weight: Array, feedback: Feedback, *, group_size: int, bits: int, dtype: mx.Dtype, xp: Any
) -> Codes:
    """Round columns in order, each against a target shifted by the errors before it.

    When a group starts, its scale and bias are fitted to the shifted targets, weighted by the pivots.

    Args:
        weight: (I, R) float32: columns first, so that one column is contiguous.
        feedback: Of the inputs.
        group_size: Columns per scale.
        bits: Width of a code.
        dtype: Stored type of scales and biases.
        xp: ``numpy`` or ``mlx.core``.
    Source: Frantar et al., GPTQ (2023), in the Cholesky form of Babai's nearest-plane rounding; the fit of
        scale and bias when a group starts is METHOD.md §4.
    """
    last = (1 << bits) - 1
    shift = xp.zeros_like(weight)
    codes, scales, biases = [], [], []
    for start in range(0, weight.shape[0], group_size):
        columns = slice(start, start + group_size)
        target = weight[columns] - shift[columns]
        groups = _fit_columns(target, feedback.pivots[columns], bits, dtype, xp)
        scale, bias = groups.scale[:, 0], groups.bias[:, 0]
        group_codes = _round_columns(
            (target - bias) / scale,
            (weight[columns] - bias) / scale,
            feedback.spread[columns, columns].T,
            last,
            xp,
        )
        codes.append(group_codes)
        scales.append(scale)
        biases.append(bias)
        if columns.stop < weight.shape[0]:
            error = group_codes * scale + bias - weight[columns]
            shift = _add_later(shift, feedback.spread, columns, error, xp)
    return Codes(codes=xp.concatenate(codes), scale=xp.stack(scales), bias=xp.stack(biases))


def refine_rows(
    weight: Array, start: Codes, feedback: Feedback, *, bits: int, dtype: mx.Dtype, xp: Any
) -> Codes:
    """Lower e·G·e further: per group, re-round each code given all others, then refit scale and bias.

    Every step keeps or lowers each row's damped loss.

    Args:
        weight: (I, R) float32, columns first.
        start: What to improve.
    Cost: per sweep as much as :func:`feedback_rows`, plus one product with the Gram at the start.
    """
    last = (1 << bits) - 1
    num_groups = start.scale.shape[0]
    group_size = weight.shape[0] // num_groups
    codes = [start.codes[g * group_size : (g + 1) * group_size] for g in range(num_groups)]
    scales, biases = [list(part) for part in (start.scale, start.bias)]
    error = start.values() - weight
    slope = feedback.gram @ error
    for _ in range(_SWEEPS):
        for g in range(num_groups):
            columns = slice(g * group_size, (g + 1) * group_size)
            gram = feedback.gram[columns, columns]
            before = codes[g] * scales[g] + biases[g]
            pull = slope[columns] / (xp.diagonal(gram)[:, None] * scales[g])
            spread = gram / xp.diagonal(gram)[:, None]
            rounded = _round_columns(codes[g] - pull, codes[g], spread, last, xp)
            local = slope[columns] + gram @ ((rounded - codes[g]) * scales[g])
            codes[g] = rounded
            scales[g], biases[g] = _refit(codes[g], scales[g], biases[g], local, gram, dtype, xp)
            change = codes[g] * scales[g] + biases[g] - before
            slope += feedback.gram[:, columns] @ change
            if xp is mx:
                mx.eval(slope, codes[g], scales[g], biases[g])
    return Codes(codes=xp.concatenate(codes), scale=xp.stack(scales), bias=xp.stack(biases))


def row_losses(error: Array, gram: Array) -> Array:
    """e·G·e of every row, (R,), for errors (I, R)."""
    return (error * (gram @ error)).sum(0)


def _fit_columns(target: Array, pivots: Array, bits: int, dtype: mx.Dtype, xp: Any) -> Groups:
    """Fit one group of columns (g, R); parameters (R, 1)."""
    rows = target.T[:, None, :]
    if xp is np:
        rows = np.ascontiguousarray(rows)
    start = edge_groups(rows, bits=bits, dtype=dtype, xp=xp)
    return fit_groups(rows, (pivots / pivots.mean())[None, None], start, bits=bits, dtype=dtype, xp=xp)


def _round_columns(position: Array, origin: Array, spread: Array, last: int, xp: Any) -> Array:
    """Round one group's columns in turn, each moved by what the ones before it were rounded away.

    Args:
        position: (g, R) where each weight would like to be, in code units.
        origin: (g, R) what a code's error is measured from, in code units.
        spread: (g, g) row j holds how far the errors of columns i < j move column j.
    Returns:
        Codes (g, R).
    """
    errors = xp.zeros_like(position)
    codes = []
    for j in range(position.shape[0]):
        wanted = position[j] - spread[j, :j] @ errors[:j] if j else position[0]
        code = xp.clip(xp.round(wanted), 0, last)
        codes.append(code)
        errors[j] = code - origin[j]
    return xp.stack(codes)


def _add_later(shift: Array, spread: Array, columns: slice, errors: Array, xp: Any) -> Array:
    """Carry a group's errors to all columns after it."""
    later = spread[columns, columns.stop :].T @ errors
    if xp is mx:
        done = shift[: columns.stop]
        shift = mx.concatenate([done, shift[columns.stop :] + later])
        mx.eval(shift)
    else:
        shift[columns.stop :] += later
    return shift


def _refit(
    codes: Array, scale: Array, bias: Array, slope: Array, gram: Array, dtype: mx.Dtype, xp: Any
) -> tuple[Array, Array]:
    """Least squares for one group's scale and bias; kept where it lowers the loss as stored."""
    weighted = gram @ codes
    qq, q1, one = (codes * weighted).sum(0), weighted.sum(0), gram.sum()
    down_scale, down_bias = -(codes * slope).sum(0), -slope.sum(0)
    determinant = qq * one - q1 * q1
    solvable = determinant > 1e-6 * qq * one
    step = (one * down_scale - q1 * down_bias) / xp.where(solvable, determinant, 1.0)
    new_scale = round_stored(xp.where(solvable, scale + step, scale), dtype, xp)
    new_scale = xp.where((xp.abs(new_scale) > 0) & xp.isfinite(new_scale), new_scale, scale)
    step = new_scale - scale
    new_bias = round_stored(bias + (down_bias - q1 * step) / xp.maximum(one, _TINY), dtype, xp)
    shift = new_bias - bias
    change = qq * step * step + 2 * q1 * step * shift + one * shift * shift
    change = change - 2 * (down_scale * step + down_bias * shift)
    better = change < 0
    return xp.where(better, new_scale, scale), xp.where(better, new_bias, bias)
