"""Decode the block formats of GGUF tensors to float32.

Pure NumPy on raw bytes; knows nothing of files or models. Each decoder takes blocks (N, nbytes) and
returns weights (N, numel), float32.

Source: struct definitions in ggml-org/ggml (ggml-common.h) and the GGUF specification.
"""

from collections.abc import Callable
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_TYPES", "BlockType"]

_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Floats: TypeAlias = npt.NDArray[np.float32]

_IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


class BlockType(msgspec.Struct, frozen=True, kw_only=True):
    """One storage format: how many weights share a block, its bytes, its decoder."""

    name: str
    numel: int
    nbytes: int
    decode: Callable[[_Bytes], _Floats]


def _half(blocks: _Bytes, start: int) -> _Floats:
    """The float16 at byte ``start`` of each block, shape (N, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: _Bytes) -> _Bytes:
    """Split (…, n) bytes into (…, 2n): all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _float32(blocks: _Bytes) -> _Floats:
    return np.ascontiguousarray(blocks).view("<f4")


def _float16(blocks: _Bytes) -> _Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bfloat16(blocks: _Bytes) -> _Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _fifth_bits(blocks: _Bytes, start: int) -> _Bytes:
    """Bit j of the 32-bit word at byte ``start`` is the fifth bit of weight j; shape (N, 32)."""
    bits: _Bytes = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little") << np.uint8(4)
    return bits


def _q5_0(blocks: _Bytes) -> _Floats:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: _Bytes) -> _Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _quarters(packed: _Bytes) -> _Bytes:
    """64 bytes of 2-bit codes as (N, 256): per 32 bytes, the four bit pairs one after the other."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    codes: _Bytes = ((packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 256)
    return codes


def _per_group(codes: npt.NDArray[np.generic], scales: _Floats, mins: _Floats | None = None) -> _Floats:
    """scale·code − min over equal runs of a 256-weight block; scales and mins are (N, runs)."""
    runs = codes.astype(np.float32).reshape(len(codes), scales.shape[1], -1) * scales[:, :, None]
    if mins is not None:
        runs -= mins[:, :, None]
    return runs.reshape(len(codes), -1)


def _q2_k(blocks: _Bytes) -> _Floats:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    mins = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _per_group(_quarters(blocks[:, 16:80]), scales, mins)


def _q3_k(blocks: _Bytes) -> _Floats:
    high = np.unpackbits(blocks[:, None, :32], axis=1, bitorder="little").reshape(-1, 256)
    codes = _quarters(blocks[:, 32:96]).astype(np.int8) - ((1 - high) << 2).astype(np.int8)
    top = blocks[:, 104:108]
    upper = np.concatenate([(top >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (_nibbles(blocks[:, 96:104]) | (upper << 4)).astype(np.float32) - 32
    return _per_group(codes, _half(blocks, 108) * scales)


def _six_bit_pairs(packed: _Bytes) -> tuple[_Floats, _Floats]:
    """The eight 6-bit scales and eight 6-bit mins in 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    mins = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _k_nibbles(packed: _Bytes) -> _Bytes:
    """128 bytes as (N, 256): per 32 bytes, low halves then high halves."""
    return _nibbles(packed.reshape(-1, 4, 32)).reshape(-1, 256)


def _q4_k(blocks: _Bytes) -> _Floats:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    return _per_group(_k_nibbles(blocks[:, 16:]), _half(blocks, 0) * scales, _half(blocks, 2) * mins)


def _q5_k(blocks: _Bytes) -> _Floats:
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    high = np.unpackbits(blocks[:, None, 16:48], axis=1, bitorder="little").reshape(-1, 256)
    codes = _k_nibbles(blocks[:, 48:]) | (high << 4)
    return _per_group(codes, _half(blocks, 0) * scales, _half(blocks, 2) * mins)


def _q6_k(blocks: _Bytes) -> _Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    codes = (low | (_quarters(blocks[:, 128:192]) << 4)).astype(np.float32) - 32
    return _per_group(codes, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


def _iq4_nl(blocks: _Bytes) -> _Floats:
    return _half(blocks, 0) * _IQ4_VALUES[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: _Bytes) -> _Floats:
    top = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    upper = ((top >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | (upper << 4)).astype(np.float32) - 32
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256)
    return _per_group(_IQ4_VALUES[codes], _half(blocks, 0) * scales)


BLOCK_TYPES: dict[int, BlockType] = {
    type_id: BlockType(name=name, numel=numel, nbytes=nbytes, decode=decode)
    for type_id, name, numel, nbytes, decode in [
        (0, "F32", 1, 4, _float32),
        (1, "F16", 1, 2, _float16),
        (2, "Q4_0", 32, 18, _q4_0),
        (3, "Q4_1", 32, 20, _q4_1),
        (6, "Q5_0", 32, 22, _q5_0),
        (7, "Q5_1", 32, 24, _q5_1),
        (8, "Q8_0", 32, 34, _q8_0),
        (10, "Q2_K", 256, 84, _q2_k),
        (11, "Q3_K", 256, 110, _q3_k),
        (12, "Q4_K", 256, 144, _q4_k),
        (13, "Q5_K", 256, 176, _q5_k),
        (14, "Q6_K", 256, 210, _q6_k),
        (20, "IQ4_NL", 32, 18, _iq4_nl),
        (23, "IQ4_XS", 256, 136, _iq4_xs),
        (30, "BF16", 1, 2, _bfloat16),
    ]
}
