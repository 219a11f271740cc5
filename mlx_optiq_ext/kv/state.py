"""A cache as plain values and arrays, so that a saved one can be opened again.

Called by the caches for their ``state``, which mlx-lm evaluates, saves and loads.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_optiq_ext.kv.codec import Codec
from mlx_optiq_ext.kv.ends import ExactEnds
from mlx_optiq_ext.kv.rows import Rows
from mlx_optiq_ext.kv.store import Layout, Store
from mlx_optiq_ext.types.quant import Choice

__all__ = ["Restored", "layout_state", "pack_state", "same_layout", "state_arrays", "unpack_state"]


class Restored(NamedTuple):
    """What :func:`unpack_state` found."""

    store: Store
    ends: ExactEnds
    shown: int
    """Columns that the last update returned."""
    numbers: dict[str, int]
    rest: list[mx.array]
    """Arrays behind those of store and ends."""


def pack_state(store: Store, ends: ExactEnds, shown: int, numbers: dict[str, int]) -> str:
    """Everything that is no array, as JSON; ``numbers`` come back as they are."""
    return json.dumps(
        {
            "layout": layout_state(store.layout),
            "used": store.used,
            "shown": shown,
            "dtype": str(store.dtype).split(".")[-1],
            "num_parts": len(store.parts),
            "num_last": len(ends.last_arrays),
            "num_first": len(ends.first_arrays),
            "numbers": numbers,
        }
    )


def state_arrays(store: Store, ends: ExactEnds) -> list[mx.array]:
    """All arrays in the order that :func:`unpack_state` takes them."""
    codecs = (store.layout.key, store.layout.value)
    means = [codec.mean for codec in codecs if codec.mean is not None]
    return [*means, *store.parts, *ends.last_arrays, *ends.first_arrays]


def unpack_state(packed: str, arrays: Sequence[mx.array]) -> Restored:
    """Store and ends again, and what else there was."""
    state = json.loads(packed)
    layout, rest = _layout_from_state(state["layout"], list(arrays))
    store, ends = Store(layout), ExactEnds(layout.recent, layout.first)
    store.used, store.dtype = state["used"], getattr(mx, state["dtype"])
    taken = []
    for name in ("num_parts", "num_last", "num_first"):
        taken.append(rest[: state[name]])
        rest = rest[state[name] :]
    parts, ends.last_arrays, ends.first_arrays = taken
    store.parts = _as_stored_here(store, parts)
    return Restored(store, ends, state["shown"], state["numbers"], rest)


def _as_stored_here(store: Store, parts: list[mx.array]) -> list[mx.array]:
    """Parts that were saved joined or apart, as this machine keeps them; lazy."""
    both_packed = store.layout.key.is_packed and store.layout.value.is_packed
    was_joined = both_packed and len(parts) == 1
    if not parts or was_joined == store.layout.joined:
        return parts
    rows = Rows(store.layout.key, store.layout.value, store.dtype)
    return rows.split(parts[0]) if was_joined else [rows.join(parts)]


def layout_state(layout: Layout) -> dict[str, Any]:
    """Everything of a layout but the means, which are arrays: JSON values."""
    return {
        "key": _codec_state(layout.key),
        "value": _codec_state(layout.value),
        "window": layout.window,
        "first_kept": layout.first_kept,
        "recent": layout.recent,
        "first": layout.first,
        "dense": layout.dense,
    }


def _layout_from_state(state: dict[str, Any], arrays: list[mx.array]) -> tuple[Layout, list[mx.array]]:
    """The layout again, and the arrays that were no means of it."""
    rest = list(arrays)
    codecs = []
    for name in ("key", "value"):
        codec = state[name]
        codecs.append(
            Codec(
                Choice.parse(codec["choice"]),
                codec["dim"],
                rotate=codec["rotate"],
                mean=rest.pop(0) if codec["mean"] else None,
                rotated=codec["rotated"],
            )
        )
    layout = Layout(
        *codecs,
        window=state["window"],
        first_kept=state["first_kept"],
        recent=state["recent"],
        first=state["first"],
        dense=state["dense"],
    )
    return layout, rest


def same_layout(one: Layout, other: Layout) -> bool:
    """Whether two caches store alike, so that their columns can be joined."""
    if one is other:
        return True
    if one.joined != other.joined or layout_state(one) != layout_state(other):
        return False
    means = [(one.key.mean, other.key.mean), (one.value.mean, other.value.mean)]
    return all(a is b or (a is not None and b is not None and bool(mx.array_equal(a, b))) for a, b in means)


def _codec_state(codec: Codec) -> dict[str, Any]:
    return {
        "choice": codec.choice.label,
        "dim": codec.dim,
        "rotate": codec.rotate,
        "rotated": codec.rotated,
        "mean": codec.mean is not None,
    }
