"""How keys or values of one layer are stored: centred, rotated, quantized.

Softmax does not see a constant taken off all keys, and an orthonormal rotation of queries and keys leaves
their products alone; both make what is stored easier to round. Knows nothing of caches. Used by ``store``
and ``attention``.
"""

import functools
import math

import mlx.core as mx

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.quant import Choice

__all__ = ["Codec", "hadamard_matrix", "rotation_divisor", "rotation_order"]


class Codec:
    """Storage of one tensor of shape (B, H, S, D).

    Args:
        choice: affine bits and group size, or keep.
        dim: D.
        rotate: Store x·R with the Hadamard matrix R of size D.
        mean: (H, D) taken off before the rotation, or None.
        rotated: x arrives as x·R already, from folded weights; then ``rotate`` is False.
    Raises:
        UsageError: The group does not divide D, or the mode is not affine.
    """

    def __init__(
        self,
        choice: Choice,
        dim: int,
        *,
        rotate: bool = False,
        mean: mx.array | None = None,
        rotated: bool = False,
    ) -> None:
        if choice.mode not in ("affine", "keep"):
            raise UsageError(f"the KV cache stores affine codes or full precision, not {choice.mode}")
        if not choice.fits(dim):
            raise UsageError(
                f"group {choice.group_size} does not divide the head of {dim} numbers; "
                "use a group that does, or keep"
            )
        self.choice, self.dim = choice, dim
        self.rotate, self.rotated = rotate and not rotated, rotated
        self.mean = mean
        self._mean_as: dict[mx.Dtype, mx.array] = {}
        self._turned_as: dict[mx.Dtype, mx.array] = {}

    @property
    def is_packed(self) -> bool:
        """Whether codes, scales and biases are stored, not numbers."""
        return self.choice.mode == "affine"

    @property
    def num_parts(self) -> int:
        """Arrays per stored tensor: codes, scales, biases; or the numbers alone."""
        return 3 if self.is_packed else 1

    @property
    def divisor(self) -> float:
        """c of :func:`rotation_divisor`; 1 where nothing is rotated here."""
        return rotation_divisor(self.dim) if self.rotate else 1.0

    def transform(self, x: mx.array) -> mx.array:
        """Into stored coordinates: (x − mean)·S/c; lazy, same shape and dtype."""
        if self.mean is None or not self.rotate:
            return self.turn(x if self.mean is None else x - self.mean_as(x.dtype))
        return mx.addmm(self._turned_mean(x.dtype), x, self._turning(x.dtype), beta=-1.0)

    def turn(self, x: mx.array) -> mx.array:
        """x·S/c, for queries as well; lazy."""
        return x @ self._turning(x.dtype) if self.rotate else x

    def turn_back(self, x: mx.array) -> mx.array:
        """The inverse of :meth:`turn`; lazy."""
        if not self.rotate:
            return x
        factor = self.divisor / rotation_order(self.dim)
        if math.log2(factor).is_integer():
            return x @ _scaled_signs(self.dim, factor, x.dtype).T
        turned = x @ _scaled_signs(self.dim, 1.0, x.dtype).T
        return (turned.astype(mx.float32) * factor).astype(x.dtype)

    @property
    def product_scale(self) -> float:
        """What turned queries · turned keys must be multiplied with to be queries · keys."""
        return self.divisor**2 / rotation_order(self.dim) if self.rotate else 1.0

    def pack(self, x: mx.array) -> list[mx.array]:
        """Stored parts of numbers in stored coordinates; lazy."""
        if not self.is_packed:
            return [x]
        codes, scales, *biases = mx.quantize(x, group_size=self.choice.group_size, bits=self.choice.bits)
        return [codes, scales, *biases]

    def unpack(self, parts: list[mx.array], dtype: mx.Dtype | None = None) -> mx.array:
        """Numbers in stored coordinates, in ``dtype`` or as they went in; lazy."""
        if not self.is_packed:
            return parts[0] if dtype is None else parts[0].astype(dtype)
        codes, scales, biases = parts
        dtype = dtype or scales.dtype
        return mx.dequantize(
            codes,
            scales.astype(dtype),
            biases.astype(dtype),
            group_size=self.choice.group_size,
            bits=self.choice.bits,
        )

    def product(self, x: mx.array, parts: list[mx.array], *, transpose: bool) -> mx.array:
        """x times packed numbers, or times their transpose, read as codes; lazy, in the dtype of ``x``."""
        codes, scales, biases = parts
        return mx.quantized_matmul(
            x,
            codes,
            scales.astype(x.dtype),
            biases.astype(x.dtype),
            transpose=transpose,
            group_size=self.choice.group_size,
            bits=self.choice.bits,
        )

    def restore(self, x: mx.array) -> mx.array:
        """Out of stored coordinates, mean added; lazy."""
        x = self.turn_back(x)
        return x if self.mean is None else x + self.mean_as(x.dtype)

    def mean_as(self, dtype: mx.Dtype) -> mx.array:
        """The mean as (1, H, 1, D)."""
        assert self.mean is not None
        if dtype not in self._mean_as:
            mean = self.mean.astype(dtype)[None, :, None, :]
            mx.eval(mean)  # shared by all caches of the layer, which may run in several threads
            self._mean_as[dtype] = mean
        return self._mean_as[dtype]

    def _turning(self, dtype: mx.Dtype) -> mx.array:
        """S/c: exact in 16 bits, for c is a power of two."""
        return _scaled_signs(self.dim, 1.0 / self.divisor, dtype)

    def _turned_mean(self, dtype: mx.Dtype) -> mx.array:
        """mean·S/c as (1, H, 1, D), rounded once."""
        if dtype not in self._turned_as:
            mean = self.mean_as(mx.float32) @ self._turning(mx.float32)
            mean = mean.astype(dtype)
            mx.eval(mean)
            self._turned_as[dtype] = mean
        return self._turned_as[dtype]


def rotation_order(dim: int) -> int:
    """n of S·Sᵀ = n · I for :func:`hadamard_matrix`: ``dim``, or the block where no such matrix is known."""
    power = dim & -dim
    if dim == power or any(dim % m == 0 and _is_power_of_two(dim // m) for m in (12, 20, 28)):
        return dim
    return power


def rotation_divisor(dim: int) -> float:
    """A power of two near √n: rotated numbers are divided by it, which costs no accuracy in 16 bits.

    The rest of the normalisation goes into the scale of the attention scores, which is float32.
    """
    return float(2 ** round(math.log2(rotation_order(dim)) / 2))


@functools.cache
def hadamard_matrix(dim: int) -> mx.array:
    """Matrix S of entries ±1 and 0 with S·Sᵀ = n · I, float32 (dim, dim); evaluated.

    A Sylvester-Hadamard matrix where ``dim`` is a power of two; otherwise the orders 12, 20 and 28 times a
    power of two that MLX knows; otherwise blocks of the largest power of two that divides ``dim``. Entries
    are exact in 16 bits.
    """
    order = rotation_order(dim)
    block = mx.hadamard_transform(mx.eye(order, stream=mx.cpu), scale=1.0, stream=mx.cpu)
    signs = mx.kron(mx.eye(dim // order, stream=mx.cpu), block, stream=mx.cpu)
    mx.eval(signs)
    return signs


@functools.cache
def _scaled_signs(dim: int, factor: float, dtype: mx.Dtype) -> mx.array:
    signs = (hadamard_matrix(dim) * factor).astype(dtype)
    mx.eval(signs)
    return signs


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
