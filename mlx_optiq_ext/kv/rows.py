"""Keys and values of one token side by side in one row of words, so that one write stores both.

Knows where in the row everything is and how to get there and back with plain array operations; ``cuda`` does
the same in kernels. Used by ``store`` where :attr:`Layout.joined <mlx_optiq_ext.kv.store.Layout>` is set.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_optiq_ext.kv.codec import Codec

__all__ = ["MAX_DIM", "Rows"]

MAX_DIM = 256
"""Longest head: what the kernels' blocks can take."""


class Rows:
    """Row of 32-bit words: key codes, key scales and biases, value codes, value scales and biases.

    Codes are MLX's. A scale and its bias stand next to each other, in one word where they have 16 bits and in
    two where they have 32, so rows take the bytes that the parts take.

    Args:
        key, value: Storage of keys and of values, both packed.
        dtype: Of the numbers that go in, and so of scales and biases.
    """

    def __init__(self, key: Codec, value: Codec, dtype: mx.Dtype) -> None:
        self.key, self.value, self.dtype = key, value, dtype
        widths = []
        for codec in (key, value):
            groups = codec.dim // codec.choice.group_size
            widths += [codec.dim * codec.choice.bits // 32, groups * dtype.size // 2]
        self.key_affine = widths[0]
        """Word at which the scales of keys begin."""
        self.value_codes = self.key_affine + widths[1]
        """Word at which the codes of values begin."""
        self.value_affine = self.value_codes + widths[2]
        """Word at which the scales of values begin."""
        self.width = self.value_affine + widths[3]
        """Words of a row."""

    @staticmethod
    def can_hold(key: Codec, value: Codec) -> bool:
        """Whether such tokens can be rows: both packed, heads of whole words, values not centred."""
        whole = all(codec.dim % 32 == 0 and codec.dim <= MAX_DIM for codec in (key, value))
        return key.is_packed and value.is_packed and value.mean is None and whole

    def encode(self, keys: mx.array, values: mx.array) -> mx.array:
        """New tokens (B, H, N, ·), as the model made them, as rows: uint32 (B, H, N, width); lazy."""
        parts = [
            *self.key.pack(self.key.transform(keys.astype(self.dtype))),
            *self.value.pack(self.value.transform(values.astype(self.dtype))),
        ]
        return self.join(parts)

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """Parts of keys and values as rows: uint32 (B, H, N, width); lazy."""
        key_codes, key_scales, key_biases, value_codes, value_scales, value_biases = parts
        return mx.concatenate(
            [
                key_codes,
                self._paired(key_scales, key_biases),
                value_codes,
                self._paired(value_scales, value_biases),
            ],
            axis=-1,
        )

    def split(self, words: mx.array) -> list[mx.array]:
        """The inverse of :meth:`join`; lazy."""
        return [
            words[..., : self.key_affine],
            *self._unpaired(words[..., self.key_affine : self.value_codes]),
            words[..., self.value_codes : self.value_affine],
            *self._unpaired(words[..., self.value_affine :]),
        ]

    def _paired(self, scales: mx.array, biases: mx.array) -> mx.array:
        pairs = mx.stack([scales, biases], axis=-1)
        return pairs.reshape(*scales.shape[:-1], -1).view(mx.uint32)

    def _unpaired(self, words: mx.array) -> list[mx.array]:
        pairs = mx.contiguous(words).view(self.dtype)
        return [pairs[..., 0::2], pairs[..., 1::2]]
