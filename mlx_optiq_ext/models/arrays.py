"""Take the arrays out of a nest of arguments or parameters, and put others back in their place."""

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten

__all__ = ["named_arrays", "split_arrays"]

Rebuild: TypeAlias = Callable[[list[mx.array]], Any]


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """Every array of a module's parameters with its dotted name, in the order of the tree."""
    pairs = tree_flatten(tree)
    assert isinstance(pairs, list)
    return pairs


def split_arrays(tree: Any) -> tuple[list[mx.array], Rebuild]:
    """Separate the arrays of a nest of tuples, lists and dicts from its shape.

    Returns:
        The arrays in order, and a function that rebuilds the nest around a list of as many arrays.
    """
    leaves: list[mx.array] = []
    return leaves, _strip(tree, leaves)


def _strip(node: Any, leaves: list[mx.array]) -> Rebuild:
    """Add a nest's arrays to ``leaves``; the function that rebuilds it holds none of them."""
    if isinstance(node, mx.array):
        position = len(leaves)
        leaves.append(node)
        return lambda arrays: arrays[position]
    if type(node) in (list, tuple):
        parts = [_strip(item, leaves) for item in node]
        kind = type(node)
        return lambda arrays: kind(part(arrays) for part in parts)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        parts = [_strip(item, leaves) for item in node]
        named = type(node)
        return lambda arrays: named(*(part(arrays) for part in parts))
    if type(node) is dict:
        items = {key: _strip(value, leaves) for key, value in node.items()}
        return lambda arrays: {key: part(arrays) for key, part in items.items()}
    return lambda _: node
