"""Oracles of packed tensors: their codes bit by bit, and what their error weighs."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.quant.pack import Packed, unpack
from mlx_optiq_ext.types.quant import Choice


def codes_of(packed_weight: mx.array, bits: int) -> npt.NDArray[np.uint8]:
    """Codes (..., I) of packed words: the stream of their bits, lowest first, cut into ``bits`` each."""
    words = np.ascontiguousarray(np.array(packed_weight), dtype="<u4").view(np.uint8)
    stream = np.unpackbits(words, axis=-1, bitorder="little")
    runs = stream.reshape(*packed_weight.shape[:-1], -1, bits)
    return np.packbits(runs, axis=-1, bitorder="little")[..., 0]


def weighted_error(weight: mx.array, packed: Packed, choice: Choice, importance: mx.array) -> float:
    """Σ_ij a_j (ŵ_ij − w_ij)² for a matrix: what the fast correction minimises."""
    error = unpack(packed, choice) - weight.astype(mx.float32)
    return float((error * error * importance.astype(mx.float32)).sum())
