"""What a quantizable module saw in one call, and the handler that notes it."""

from collections.abc import Callable
from copy import copy
from itertools import accumulate
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Call", "Capture", "HeadOverride", "UnitTap"]

HeadOverride = Callable[[mx.array, Callable[[mx.array], mx.array]], mx.array]
"""``override(h, head)``: takes the head's input and the head itself, returns what stands for its output."""


class Call(NamedTuple):
    """The input side of one call of a quantizable module."""

    path: str
    x: mx.array
    """Input: (..., I) floats, or token ids of an embedding."""
    experts: mx.array | None
    """Expert of each row of ``x`` (switch layers), else None."""
    transposed: bool
    """True where the module was used as x @ W instead of x @ Wᵀ (MLA heads)."""
    as_head: bool
    """True for the head, tied or not."""


class Capture(NamedTuple):
    """One call with its gradient."""

    call: Call
    g: mx.array
    """Gradient of the loss with respect to the output, summed over positions: (..., O)."""


class UnitTap:
    """Handler for :func:`intercepted`: notes the inputs of quantizable modules and adds deltas to outputs.

    A delta of zeros changes nothing, but differentiating with respect to it gives the gradient of the
    module's output. A fused projection that returns several arrays has one output, their concatenation.

    Args:
        paths: Module path by ``id(module)``.
        heads: Paths of modules that are the head (the tied embedding counts when used ``as_linear``).
        deltas: One array per call in call order, heads left out; None adds nothing.
        head: Replaces the head's computation.
    """

    def __init__(
        self,
        paths: dict[int, str],
        heads: frozenset[str] = frozenset(),
        deltas: list[mx.array] | None = None,
        head: HeadOverride | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.output_shapes: list[tuple[tuple[int, ...], mx.Dtype]] = []
        self._paths = paths
        self._heads = heads
        self._deltas = deltas
        self._head = head

    def __call__(
        self, module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note the call, run it, add the delta."""
        path = self._paths[id(module)]
        as_head = bool(kwargs.pop("_as_linear", False)) or path in self._heads
        if as_head:
            return self._head(args[0], original) if self._head is not None else original(*args, **kwargs)
        second = args[1] if len(args) > 1 else kwargs.get("indices", kwargs.get("transpose"))
        experts = second if isinstance(second, mx.array) else None
        call = Call(path, copy(args[0]), experts, second is False, False)
        output = original(*args, **kwargs)
        pieces = list(output) if isinstance(output, list | tuple) else [output]
        y = self.add(call, pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1))
        if self._deltas is None:
            return output
        if isinstance(output, mx.array):
            return y
        ends = list(accumulate(piece.shape[-1] for piece in pieces))
        return mx.split(y, ends[:-1], axis=-1)

    def add(self, call: Call, y: mx.array) -> mx.array:
        """Note a call and its output, and add the delta to that; lazy."""
        self.calls.append(call)
        self.output_shapes.append((y.shape, y.dtype))
        return y if self._deltas is None else y + self._deltas[len(self.calls) - 1]
