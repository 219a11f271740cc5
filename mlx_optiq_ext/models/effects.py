"""What a call changes besides what it returns: caches, running sums and dicts that its arguments bring along.

Some families hand blocks an object or a dict that they fill. To answer a call from a record, the object
must be left as the call would have left it. Called by ``tape`` and ``reverse``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_optiq_ext.models.arrays import is_holder, split_arrays

__all__ = ["Effects", "Outcome", "replay"]


class Outcome(NamedTuple):
    """Everything a call left behind."""

    output: Any
    states: list[tuple[int, Any]]
    """Per changed holder its position among the holders of the arguments, and what it holds now."""


class Effects:
    """Notes what the arguments of a call hold before it runs.

    Args:
        arguments: The call's positional and keyword arguments.
    """

    def __init__(self, arguments: Any) -> None:
        self._holders = _holders(arguments)
        self._before = [_contents(holder) for holder in self._holders]

    def after(self, output: Any) -> tuple[list[mx.array], Callable[[list[mx.array]], Outcome]]:
        """Arrays of the outcome, now that the call has returned, and what rebuilds it around others."""
        states = [
            (position, _contents(holder))
            for position, (holder, before) in enumerate(zip(self._holders, self._before, strict=True))
            if _has_changed(holder, before)
        ]
        leaves, rebuild = split_arrays((output, states))
        return leaves, lambda arrays: Outcome(*rebuild(arrays))


def replay(arguments: Any, outcome: Outcome) -> Any:
    """Leave the arguments as the call would have left them, and return what it would have returned."""
    found = _holders(arguments)
    for position, state in outcome.states:
        holder = found[position]
        if isinstance(holder, list):
            holder[:] = state
        else:
            held = holder if isinstance(holder, dict) else vars(holder)
            held.clear()
            held.update(state)
    return outcome.output


def _holders(tree: Any) -> list[Any]:
    """Every list, dict and object of a nest that a call could change, each once, in order."""
    found: dict[int, Any] = {}

    def visit(node: Any) -> None:
        if isinstance(node, mx.array) or id(node) in found:
            return
        if is_holder(node):
            found[id(node)] = node
        if is_holder(node) or isinstance(node, tuple):
            inner = _contents(node)
            for child in inner.values() if isinstance(inner, dict) else inner:
                visit(child)

    visit(tree)
    holders = list(found.values())
    found.clear()  # ``visit`` refers to itself and to it: it would keep what the holders hold alive
    return holders


def _contents(holder: Any) -> Any:
    if isinstance(holder, list | tuple):
        return list(holder)
    return dict(holder if isinstance(holder, dict) else vars(holder))


def _has_changed(holder: Any, before: Any) -> bool:
    """Whether a holder holds something else; one that holds arrays may have changed them in place."""
    now = _contents(holder)
    if type(holder) not in (list, dict) and any(isinstance(value, mx.array) for value in now.values()):
        return True
    if isinstance(now, dict):
        return now.keys() != before.keys() or not all(_is_same(now[key], before[key]) for key in now)
    return len(now) != len(before) or not all(map(_is_same, now, before))


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, int | float | str) and one == other)
