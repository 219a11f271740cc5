"""The full correction: error-feedback rounding of whole tensors, never worse than the fast one.

Cuts experts into matrices and matrices into chunks of rows; the numerics are in ``gptq``. Knows nothing of
models.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.quant.fast import (
    Coded,
    fit_tensor,
    join_coded,
    on_cpu,
    pack_coded,
    pack_fast,
    usable_importance,
)
from mlx_optiq_ext.quant.fit import Array, Groups
from mlx_optiq_ext.quant.gptq import Codes, Feedback, feedback_rows, prepare_feedback, refine_rows, row_losses
from mlx_optiq_ext.quant.pack import Packed, pack_plain, require_fit
from mlx_optiq_ext.quant.threads import in_threads
from mlx_optiq_ext.types.quant import Choice

__all__ = ["pack_full"]

_CPU_ROWS = 1024
_GPU_ROWS = 16384


def pack_full(weight: mx.array, choice: Choice, gram: mx.array, *, float_dtype: mx.Dtype) -> Packed:
    """Quantize with error feedback over the inputs' Gram, then refine codes, scales and biases under it.

    Row by row the result of :func:`~mlx_optiq_ext.quant.fast.pack_fast` is kept where it has the lower
    e·G·e, so the whole is never worse than it.

    Args:
        weight: (O, I) or (E, O, I), finite.
        choice: Affine choices are corrected; the float modes are stored as ``pack_fast`` does.
        gram: G = E[x xᵀ], (I, I) or (E, I, I).
        float_dtype: Stored type of scales and biases.
    Returns:
        Evaluated arrays, in the plain layout: columns are not reordered.
    Raises:
        ModelError: The weight holds NaN or infinity.
        MeasurementError: ``gram`` is not finite, not positive semi-definite or of the wrong shape.
    Cost: about 8·O·I² multiplications and one Cholesky of the Gram per matrix.
    """
    require_fit(weight, choice)
    gram = _usable_gram(gram, weight)
    diagonal = mx.diagonal(gram, axis1=-2, axis2=-1)
    plain = pack_plain(weight, choice, float_dtype=float_dtype)
    if plain.biases is None:
        return pack_fast(weight, choice, diagonal, float_dtype=float_dtype)
    fast = fit_tensor(weight, usable_importance(diagonal, weight), plain, choice, float_dtype)
    xp: Any = np if on_cpu() else mx
    rows: Array = weight.astype(mx.float32).reshape(-1, weight.shape[-1])
    rows = np.array(rows) if xp is np else rows
    grams = gram.reshape(-1, *gram.shape[-2:])
    per_gram = rows.shape[0] // grams.shape[0]
    step = _CPU_ROWS if xp is np else _GPU_ROWS
    corrected = []
    for matrix in range(grams.shape[0]):
        raw = np.array(grams[matrix])
        job = _MatrixJob(rows, fast, raw, choice, float_dtype, xp)
        first = matrix * per_gram
        spans = [(low, min(low + step, first + per_gram)) for low in range(first, first + per_gram, step)]
        corrected += in_threads(job.correct, spans) if xp is np else [job.correct(span) for span in spans]
    return pack_coded(join_coded(corrected, xp), plain, choice)


class _MatrixJob:
    """One matrix with its factored Gram; :meth:`correct` may run on several threads (NumPy only)."""

    def __init__(
        self, rows: Array, fast: Coded, gram: Array, choice: Choice, dtype: mx.Dtype, xp: Any
    ) -> None:
        self._rows, self._fast, self._choice, self._xp = rows, fast, choice, xp
        self._feedback: Feedback = prepare_feedback(gram, xp)
        self._gram: Array = xp.array(gram)
        self._settings = {"bits": choice.bits, "dtype": dtype, "xp": xp}

    def correct(self, span: tuple[int, int]) -> Coded:
        """Feedback and refinement for a range of rows; the fast rows where they lose less under the Gram."""
        xp, rows = self._xp, slice(*span)
        weight = self._rows[rows].T
        if xp is np:
            weight = np.ascontiguousarray(weight)
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite error is never preferred
            ours = feedback_rows(weight, self._feedback, group_size=self._choice.group_size, **self._settings)
            ours = refine_rows(weight, ours, self._feedback, **self._settings)
            theirs = _columns_first(self._fast, rows, xp)
            better = row_losses(ours.values() - weight, self._gram) < row_losses(
                theirs.values() - weight, self._gram
            )
        coded = Coded(
            codes=xp.where(better, ours.codes, theirs.codes).T.astype(xp.uint8),
            groups=Groups(
                scale=xp.where(better, ours.scale, theirs.scale).T,
                bias=xp.where(better, ours.bias, theirs.bias).T,
            ),
        )
        if xp is mx:
            mx.eval(coded.codes, coded.groups.scale, coded.groups.bias)
        return coded


def _columns_first(coded: Coded, rows: slice, xp: Any) -> Codes:
    """A range of rows of the fast result in the orientation of ``gptq``."""
    codes = coded.codes[rows].T.astype(xp.float32)
    return Codes(codes=codes, scale=coded.groups.scale[rows].T, bias=coded.groups.bias[rows].T)


def _usable_gram(gram: mx.array, weight: mx.array) -> mx.array:
    """The Gram as float32, (I, I) or (E, I, I); shape and finiteness checked."""
    width = weight.shape[-1]
    wanted: list[tuple[int, ...]] = [(width, width)]
    if weight.ndim == 3:
        wanted.append((weight.shape[0], width, width))
    if tuple(gram.shape) not in wanted:
        raise MeasurementError(
            f"Gram of shape {tuple(gram.shape)} does not belong to a weight of shape {tuple(weight.shape)}; "
            f"expected {' or '.join(map(str, wanted))}"
        )
    gram = gram.astype(mx.float32)
    if not bool(mx.isfinite(gram).all().item()):
        raise MeasurementError("the Gram of the inputs holds non-finite values; measure the inputs again")
    return gram
