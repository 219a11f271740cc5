"""Take the arrays out of a nest of arguments or parameters, and put others back in their place.

A nest is made of tuples, lists, dicts and plain objects (caches, running sums); modules and everything else
are left as they are. Knows nothing of what the arrays mean.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

__all__ = ["is_holder", "named_arrays", "split_arrays"]


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """Every array of a module's parameters with its dotted name, in the order of the tree."""
    pairs = tree_flatten(tree)
    assert isinstance(pairs, list)
    return pairs


def split_arrays(tree: Any) -> tuple[list[mx.array], Callable[[list[mx.array]], Any]]:
    """Separate the arrays of a nest from its shape.

    Returns:
        The arrays in order, and a function that rebuilds the nest around a list of as many arrays. Lists,
        dicts and objects are built anew each time, so that whoever changes them changes nothing else; an
        object that stands in several places is one object again.
    """
    leaves: list[mx.array] = []
    seen: dict[int, int] = {}

    def strip(node: Any) -> Callable[[list[mx.array], dict[int, Any]], Any]:
        if isinstance(node, mx.array):
            position = len(leaves)
            leaves.append(node)
            return lambda arrays, _: arrays[position]
        if isinstance(node, tuple):
            parts = [strip(item) for item in node]
            kind: Any = getattr(type(node), "_make", type(node))
            return lambda arrays, made: kind(part(arrays, made) for part in parts)
        if type(node) is list:
            items = [strip(item) for item in node]
            return lambda arrays, made: [item(arrays, made) for item in items]
        if type(node) is dict:
            entries = {key: strip(value) for key, value in node.items()}
            return lambda arrays, made: {key: entry(arrays, made) for key, entry in entries.items()}
        return strip_object(node) if is_holder(node) else lambda _, __: node

    def strip_object(node: Any) -> Callable[[list[mx.array], dict[int, Any]], Any]:
        if id(node) in seen:
            known = seen[id(node)]
            return lambda _, made: made[known]
        slot = seen[id(node)] = len(seen)
        entries = {key: strip(value) for key, value in vars(node).items()}

        def build(arrays: list[mx.array], made: dict[int, Any]) -> Any:
            made[slot] = new = object.__new__(type(node))
            for key, entry in entries.items():
                new.__dict__[key] = entry(arrays, made)
            return new

        return build

    rebuild = strip(tree)
    found = list(leaves)
    leaves.clear()  # the functions above refer to each other and to it: they would keep the arrays alive
    return found, lambda arrays: rebuild(arrays, {})


def is_holder(node: Any) -> bool:
    """Whether a node can be changed in place: lists, dicts, and plain objects with attributes."""
    if type(node) in (list, dict):
        return True
    unchanging = isinstance(node, tuple | nn.Module | type | ModuleType) or callable(node)
    return not unchanging and hasattr(node, "__dict__")
