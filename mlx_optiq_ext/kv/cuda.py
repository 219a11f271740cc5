"""Kernels of our own for MLX's CUDA back end: storing tokens as rows, attention of a few queries over them.

A decoded token then takes two operations to be stored and one to attend, no more than with full precision;
each operation costs that back end more than the bytes that it moves. Knows rows and codecs, not caches. Used
by ``store`` and ``attention``.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_optiq_ext.kv.codec import Codec, hadamard_matrix, rotation_order
from mlx_optiq_ext.kv.cuda_attend import ATTEND
from mlx_optiq_ext.kv.cuda_encode import ENCODE, SHARED
from mlx_optiq_ext.kv.rows import Rows

__all__ = ["SWITCH", "CudaRows", "is_on_cuda", "is_wanted"]

SWITCH = "MLX_OPTIQ_KV_KERNELS"
"""Environment variable that turns these kernels off for caches made from then on, when it is 0."""

_MAX_ROWS = 8
"""Query rows of a block: a thread holds eight sums of each in registers."""
_MAX_WARPS = 4
_MAX_SHARED = 96 * 1024
"""Bytes of shared memory that a block may take on every GPU since Ampere."""
_BLOCKS = 512
"""Blocks that keep a large GPU busy."""
_MAX_SPLITS = 64
_NAMES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16"}

_COUNTERS = 32
"""Counters per key-value head that storing makes ready: one per tile of its query rows."""

_Kernel = Any


def is_wanted() -> bool:
    """Whether caches made now should be stored for these kernels: on CUDA, unless they are switched off."""
    return is_on_cuda() and os.environ.get(SWITCH, "") != "0"


def is_on_cuda() -> bool:
    """Whether MLX computes on CUDA here and now."""
    return _has_cuda() and mx.default_device() == mx.gpu


@functools.cache
def _has_cuda() -> bool:
    return mx.cuda.is_available()


class CudaRows(Rows):
    """Rows that kernels write and read, while MLX is on CUDA; arguments as of ``Rows``."""

    def __init__(self, key: Codec, value: Codec, dtype: mx.Dtype) -> None:
        super().__init__(key, value, dtype)
        self._attending: dict[_Call, tuple[_Kernel, int]] = {}

    def encode_for_attention(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array | None]:
        """What :meth:`encode` gives, up to the order of sums in a rotation, and counters for one attention.

        Returns:
            The rows, and int32 zeros that one call of :meth:`attend` may take; None: not on CUDA. Both lazy.
        """
        if not is_on_cuda():
            return self.encode(keys, values), None
        batch, heads, tokens = keys.shape[:3]
        inputs = [keys, values]
        if self.key.mean is not None:  # rounded as the codec rounds it
            inputs.append(self.key.mean_as(mx.float32 if self.key.rotate else self.dtype))
        inputs += [_signs(codec.dim, False) for codec in (self.key, self.value) if codec.rotate]
        threads = max(self.key.dim, self.value.dim)
        words, counters = self._encoding(
            inputs=inputs,
            grid=(batch * heads * tokens * threads, 2, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(batch, heads, tokens, self.width), (batch, heads, _COUNTERS)],
            output_dtypes=[mx.uint32, mx.int32],
        )
        return words, counters

    def attend(
        self,
        words: mx.array,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
        counters: mx.array | None,
    ) -> mx.array:
        """softmax(scale · Q·Kᵀ + mask)·V for a few queries; lazy.

        Args:
            words: uint32 (B, H, S, width), columns next to each other in memory.
            queries: (B, Hq, L, D), as the model made them.
            scale: Multiplies the products.
            mask: As for ``attention.attend``.
            sinks: float32 logits (B, Hq, L) beside the scores of centred keys, or None.
            counters: Of :meth:`encode_for_attention`, for this call alone; None: made here.
        Returns:
            (B, Hq, L, Dv) in the dtype of ``queries``, values turned back.
        """
        batch, num_queries, length, _ = queries.shape
        heads, columns = words.shape[1:3]
        num_rows = num_queries // heads * length
        tiles = -(-num_rows // _MAX_ROWS)
        if counters is None or tiles > _COUNTERS:
            counters = mx.zeros((batch, heads, tiles), dtype=mx.int32)
        inputs, masking = [queries, words, counters], 0
        if isinstance(mask, mx.array):
            masking = 1 if mask.dtype == mx.bool_ else 2
            inputs.append(mx.broadcast_to(mask, (batch, num_queries, length, columns)))
        if sinks is not None:
            inputs.append(sinks)
        if self.key.rotate:
            inputs.append(_signs(self.key.dim, False))
        if self.value.rotate:
            inputs.append(_signs(self.value.dim, True))
        causal, dim = isinstance(mask, str) and length > 1, self.value.dim
        call = _Call(-(-num_rows // tiles), masking, causal, sinks is not None, scale, queries.dtype)
        kernel, warps = self._attending.get(call) or self._attention(call)
        splits = _num_splits(batch * heads * tiles, columns, warps)
        num_out = batch * num_queries * length
        out: mx.array = kernel(
            inputs=inputs,
            grid=(splits * 32 * warps, heads * tiles, batch),
            threadgroup=(32 * warps, 1, 1),
            output_shapes=[(batch, num_queries, length, dim), (num_out, splits, dim + 2)],
            output_dtypes=[queries.dtype, mx.float32],
        )[0]
        return out

    @functools.cached_property
    def _encoding(self) -> _Kernel:
        inputs = ["keys", "values"]
        if self.key.mean is not None:
            inputs.append("key_mean")
        inputs += ["key_signs"] * self.key.rotate + ["value_signs"] * self.value.rotate
        constants = _constants(self) + _integers(COUNTERS=_COUNTERS)
        constants += f"#define K_MEAN {int(self.key.mean is not None)}\n"
        return _kernel("encode", inputs, ["words", "counters"], constants, ENCODE)

    def _attention(self, call: "_Call") -> tuple[_Kernel, int]:
        """Make the kernel of such calls, and say how many warps its blocks have."""
        warps = _MAX_WARPS
        while warps > 1 and self._shared_bytes(call.rows, warps) > _MAX_SHARED:
            warps //= 2
        factor = call.scale * math.log2(math.e) * _back_factor(self.key)
        constants = _constants(self) + _integers(ROWS=call.rows, WARPS=warps, CAUSAL=int(call.causal))
        constants += f"#define MASK {call.masking}\n#define SINKS {int(call.has_sinks)}\n"
        constants += f"constexpr float QUERY_FACTOR = {factor:.9e}f;\nusing Out = {_NAMES[call.dtype]};\n"
        inputs = ["queries", "words", "counters"] + ["mask"] * bool(call.masking) + ["sinks"] * call.has_sinks
        inputs += ["key_signs"] * self.key.rotate + ["value_signs"] * self.value.rotate
        shared = self._shared_bytes(call.rows, warps)
        kernel = _kernel("attend", inputs, ["out", "parts"], constants, ATTEND, shared)
        self._attending[call] = kernel, warps
        return kernel, warps

    def _shared_bytes(self, rows: int, warps: int) -> int:
        """Weights, and in turn queries, the rows of 32 tokens twice per warp, and the sums of the warps."""
        queries = rows * self.key.dim * (2 if self.key.rotate else 1)
        staged = max(queries, warps * 2 * 32 * self.width, warps * rows * self.value.dim)
        return 4 * (warps * 32 * (-(-rows // 4) * 4) + staged)


class _Call(NamedTuple):
    """What a kernel of attention is made for besides the rows."""

    rows: int
    """Query rows of a block."""
    masking: int
    """0: no array; 1: bool; 2: additive."""
    causal: bool
    has_sinks: bool
    scale: float
    dtype: mx.Dtype


def _num_splits(units: int, columns: int, warps: int) -> int:
    """Parts of the columns, none empty: enough blocks for the GPU, and columns for every warp."""
    steps = -(-columns // 32)
    wanted = max(1, min(-(-_BLOCKS // units), -(-steps // warps), _MAX_SPLITS))
    return -(-steps // -(-steps // wanted))


def _kernel(
    name: str, inputs: list[str], outputs: list[str], constants: str, text: str, shared: int = 0
) -> _Kernel:
    functions, body = (_bare(part) for part in (SHARED + text).split("// BODY\n"))
    return mx.fast.cuda_kernel(
        name=f"optiq_kv_{name}",
        input_names=inputs,
        output_names=outputs,
        header=constants + functions,
        source=body,
        ensure_row_contiguous=False,
        shared_memory=shared,
    )


def _bare(text: str) -> str:
    """Without comments and indentation: the text is copied and hashed whenever a kernel is called."""
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _constants(rows: CudaRows) -> str:
    """What both kernels know of these rows."""
    text = _integers(
        WIDTH=rows.width,
        K_AFFINE=rows.key_affine,
        V_CODES=rows.value_codes,
        V_AFFINE=rows.value_affine,
        NUMBER_IS_HALF=int(rows.dtype == mx.float16),
    )
    for prefix, name, codec in (("K", "key_signs", rows.key), ("V", "value_signs", rows.value)):
        order = rotation_order(codec.dim) if codec.rotate else 0
        bits, group = codec.choice.bits, codec.choice.group_size
        numbers = {"DIM": codec.dim, "BITS": bits, "GROUP": group, "ORDER": order}
        text += _integers(**{f"{prefix}_{what}": number for what, number in numbers.items()})
        text += f"constexpr float {prefix}_FACTOR = {1.0 / codec.divisor!r}f;\n"
        text += f"#define {prefix}_SIGNS {name if codec.rotate else 'nullptr'}\n"
    text += f"constexpr float OUT_FACTOR = {_back_factor(rows.value):.9e}f;\n"
    return text + f"using Number = {_NAMES[rows.dtype]};\n"


def _integers(**numbers: int) -> str:
    return "".join(f"constexpr int {name} = {number};\n" for name, number in numbers.items())


def _back_factor(codec: Codec) -> float:
    """What a product with S must be multiplied with to undo x·S/c, or to go with it: c/n."""
    return codec.divisor / rotation_order(codec.dim) if codec.rotate else 1.0


@functools.cache
def _signs(dim: int, back: bool) -> mx.array:
    """Where the Hadamard matrix is negative, a bit per entry: uint32 (dim, order / 32), a row per output."""
    order, matrix = rotation_order(dim), np.array(hadamard_matrix(dim))
    by_output = matrix if back else matrix.T
    blocks = [by_output[j, j // order * order :][:order] < 0 for j in range(dim)]
    signs = mx.array(np.packbits(np.stack(blocks), axis=1, bitorder="little").view("<u4"))
    mx.eval(signs)  # shared by all caches, which may run in several threads
    return signs
