"""From what a user asks for to a budget in stored bits.

Knows the sensitivity table's totals and nothing of how bits are spent. Called by ``bitmap``.
"""

import msgspec

from mlx_optiq_ext.errors import BudgetInfeasible, UsageError
from mlx_optiq_ext.types.nbytes import format_nbytes, parse_nbytes
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["Budget", "budget_from", "format_nbytes", "head_room_nbytes", "left_for_cache", "parse_nbytes"]

_HEAD_ROOM_SHARE = 0.10
_HEAD_ROOM_LEAST = 256_000_000
# A safetensors header names every tensor with its type, shape and two offsets: about 110 bytes and the name.
_HEADER_ENTRY = 110
_TENSORS_PER_PATH = 5  # weight, scales, biases, and a share of norms and linear biases


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A ceiling for all stored bits of a model."""

    bits: int
    origin: str
    """How it was asked for, for messages: ``--target-bpw 5.0``."""


def budget_from(
    table: SensitivityTable, options: AllocateOptions, *, kv_bytes_per_token: int | None = None
) -> Budget:
    """Turn the one target given in ``options`` into stored bits of the whole model.

    ``--target-bpw`` counts tensors only. ``--target-size`` and ``--fit`` also set the files' headers apart.
    ``--fit`` leaves room for the KV cache of ``--context`` tokens and for :func:`head_room_nbytes`.

    Args:
        kv_bytes_per_token: Mean bytes of KV cache per token of context; needed for ``--fit``.
    Raises:
        UsageError: None or several targets, a size that cannot be read, ``--fit`` without KV size.
        BudgetInfeasible: Nothing is left for weights.
    """
    given = {
        "--target-bpw": options.target_bpw,
        "--target-size": options.target_size,
        "--fit": options.fit,
    }
    named = [flag for flag, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "no target"
        raise UsageError(f"{found} given; give exactly one of {', '.join(given)}, such as --target-bpw 5.0")
    if options.target_bpw is not None:
        # Rounded down, for the target is a ceiling; the addend undoes 4.699999 for a product of 4.7.
        bits = int(options.target_bpw * table.total_numel + 1e-6)
        return Budget(bits=bits, origin=f"--target-bpw {options.target_bpw:g}")
    if options.target_size is not None:
        nbytes = parse_nbytes(options.target_size, flag="--target-size")
        return Budget(
            bits=8 * (nbytes - _header_nbytes(table)), origin=f"--target-size {options.target_size}"
        )
    return _budget_to_fit(table, options, kv_bytes_per_token)


def head_room_nbytes(memory: int, least: int = _HEAD_ROOM_LEAST) -> int:
    """Memory that is left for activations and the system: a tenth, at least 256 MB unless said otherwise."""
    return max(int(memory * _HEAD_ROOM_SHARE), least)


def left_for_cache(memory: int, weights: int) -> int:
    """Bytes of ``--fit`` that weights and :func:`head_room_nbytes` leave for a KV cache.

    Raises:
        BudgetInfeasible: Nothing is left.
    """
    room = head_room_nbytes(memory)
    if weights + room >= memory:
        raise BudgetInfeasible(
            f"--fit: weights take {format_nbytes(weights)} and head room {format_nbytes(room)} of "
            f"{format_nbytes(memory)}; no room is left for a KV cache: quantize the weights further"
        )
    return memory - weights - room


def _budget_to_fit(
    table: SensitivityTable, options: AllocateOptions, kv_bytes_per_token: int | None
) -> Budget:
    """What the memory of ``--fit`` leaves for weights."""
    if kv_bytes_per_token is None:
        raise UsageError(
            "--fit needs the model's config.json to know its KV cache, and it is not at hand; "
            "name it, or use --target-size"
        )
    memory = parse_nbytes(options.fit or "", flag="--fit")
    cache = kv_bytes_per_token * options.context
    room = head_room_nbytes(memory)
    left = memory - cache - room - _header_nbytes(table)
    if left <= 0:
        raise BudgetInfeasible(
            f"--fit {options.fit}: the KV cache of {options.context} tokens takes {format_nbytes(cache)}, "
            f"head room {format_nbytes(room)}; nothing is left for weights: raise --fit or lower --context"
        )
    origin = (
        f"--fit {options.fit}: {format_nbytes(left)} for weights after {format_nbytes(cache)} KV cache at "
        f"{options.context} tokens and {format_nbytes(room)} head room"
    )
    return Budget(bits=8 * left, origin=origin)


def _header_nbytes(table: SensitivityTable) -> int:
    """Estimated size of the headers of the weight files, on the safe side."""
    paths = [path for unit in table.units for path in unit.paths]
    return sum(_TENSORS_PER_PATH * (len(path) + _HEADER_ENTRY) for path in paths)
