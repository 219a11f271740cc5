"""Layers that add the low-rank residual of each row's adapter to what the base computes.

y = W x + x a_s b_s with s the row's slot (Hu et al. 2021, equation 3; the scale is part of b). Rows of one
adapter cost two small products; rows of several gather theirs from a stack, padded with zeros to the largest
rank. Rows without adapter add exact zeros. Knows slots, not names or files. Made by ``mount``.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.adapters.rows import Selection, selection
from mlx_optiq_ext.lora.factors import Factors, pad_rank

__all__ = [
    "Factors",
    "RoutedEmbedding",
    "RoutedLayer",
    "RoutedLinear",
    "RoutedSwitchLinear",
    "noting_experts",
]


class RoutedLayer(nn.Module):
    """A base layer with residuals in slots.

    Args:
        base: The layer of the model.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.base = base
        self._slots: dict[int, Factors] = {}
        self._stack: tuple[dict[int, int], mx.array, mx.array] | None = None

    def put(self, slot: int, residual: Factors) -> None:
        """Give a slot its residual."""
        self._slots[slot] = residual
        self._stack = None

    def take(self, slot: int) -> bool:
        """Empty a slot; whether any is left."""
        self._slots.pop(slot, None)
        self._stack = None
        return bool(self._slots)

    def residual_of(self, slot: int) -> Factors | None:
        """What a slot holds; None where its adapter leaves this layer alone."""
        return self._slots.get(slot)

    def stacked(self) -> tuple[dict[int, int], mx.array, mx.array]:
        """Place of each slot, and all factors, zeros first: (n+1, …, I, r), (n+1, …, r, O)."""
        if self._stack is None:
            rank = max(residual.rank for residual in self._slots.values())
            padded = [pad_rank(residual, rank) for residual in self._slots.values()]
            a = mx.stack([mx.zeros_like(padded[0][0]), *(each[0] for each in padded)])
            b = mx.stack([mx.zeros_like(padded[0][1]), *(each[1] for each in padded)])
            mx.eval(a, b)
            self._stack = {slot: k + 1 for k, slot in enumerate(self._slots)}, a, b
        return self._stack

    def concerns(self, chosen: Selection | None) -> bool:
        """Whether any row has a residual here."""
        return chosen is not None and any(slot in self._slots for slot in chosen.slots)

    def places(self, chosen: Selection) -> Selection:
        """The rows' places in :meth:`stacked`; 0 for rows without residual."""
        where, _, _ = self.stacked()
        return Selection([where.get(slot, 0) for slot in chosen.slots])


class RoutedLinear(RoutedLayer):
    """A linear layer, quantized or not."""

    def __call__(self, x: mx.array) -> mx.array:
        """Args: x: (B, …, I), or rows flattened into the first axis. Returns: (B, …, O); lazy."""
        y: mx.array = self.base(x)
        chosen = selection()
        if chosen is None or not self.concerns(chosen):
            return y
        return y + self._residual(x, chosen).astype(y.dtype)

    def _residual(self, x: mx.array, chosen: Selection) -> mx.array:
        only = chosen.only
        if only is not None:
            one = self._slots[only]
            return (x @ one.a) @ one.b
        _, a, b = self.stacked()
        rows = mx.array(self.places(chosen).slots, dtype=mx.uint32)
        flat = x.reshape(len(chosen.slots), -1, x.shape[-1])
        z = mx.gather_mm(flat, a, rhs_indices=rows)
        z = mx.gather_mm(z, b, rhs_indices=rows)
        return z.reshape(*x.shape[:-1], z.shape[-1])


class RoutedEmbedding(RoutedLayer):
    """An embedding, quantized or not, tied to the output head or not."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """Args: tokens: (B, T). Returns: (B, T, D); lazy."""
        y: mx.array = self.base(tokens)
        chosen = selection()
        if chosen is None or not self.concerns(chosen):
            return y
        _, a, b = self.stacked()
        rows = mx.array(self.places(chosen).slots, dtype=mx.uint32)
        z = mx.gather_mm(a[rows[:, None], tokens], b, rhs_indices=rows)
        return y + z.astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied output head. Args: x: (B, T, D). Returns: (B, T, V); lazy."""
        y: mx.array = self.base.as_linear(x)
        chosen = selection()
        if chosen is None or not self.concerns(chosen):
            return y
        _, a, b = self.stacked()
        rows = mx.array(self.places(chosen).slots, dtype=mx.uint32)
        z = mx.gather_mm(x, b.swapaxes(-1, -2), rhs_indices=rows)
        z = mx.gather_mm(z, a.swapaxes(-1, -2), rhs_indices=rows)
        return y + z.astype(y.dtype)


class RoutedSwitchLinear(RoutedLayer):
    """The experts of one projection, quantized or not; their parent needs :func:`noting_experts`."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Take and return what mlx-lm's ``SwitchLinear`` does, with residuals; lazy."""
        y: mx.array = self.base(x, indices, sorted_indices=sorted_indices)
        chosen = selection()
        if chosen is None or not self.concerns(chosen):
            return y
        only = chosen.only
        if only is not None:
            one = self._slots[only]
            a, b, where = one.a, one.b, indices
        else:
            _, stacked_a, stacked_b = self.stacked()
            experts = stacked_a.shape[1]
            a, b = stacked_a.reshape(-1, *stacked_a.shape[2:]), stacked_b.reshape(-1, *stacked_b.shape[2:])
            where = self._rows(indices, self.places(chosen), chosen, sorted_indices) * experts + indices
        z = mx.gather_mm(x, a, rhs_indices=where)
        z = mx.gather_mm(z, b, rhs_indices=where)
        return y + z.astype(y.dtype)

    def _rows(
        self, indices: mx.array, places: Selection, chosen: Selection, sorted_indices: bool
    ) -> mx.array:
        """The place of every (token, expert) pair, in the order in which they come, shaped as ``indices``."""
        rows = places.per_item(indices.size)
        if not sorted_indices:
            return rows.reshape(indices.shape)
        assert chosen.experts is not None, "noting_experts() was not applied"
        return rows[mx.argsort(chosen.experts.flatten())]


def noting_experts(module: nn.Module) -> None:
    """Let a module that holds expert layers say which experts it was given: it sorts tokens by them.

    Applied once; changes the module's class to a subclass of itself.
    """
    stock: Any = type(module)
    if getattr(stock, "notes_experts", False):
        return

    class Noting(stock):  # type: ignore[misc]
        notes_experts = True

        def __call__(self, x: mx.array, indices: mx.array, *more: Any, **named: Any) -> Any:
            chosen = selection()
            if chosen is not None:
                chosen.experts = indices
            return super().__call__(x, indices, *more, **named)

    Noting.__name__, Noting.__qualname__ = stock.__name__, stock.__qualname__
    module.__class__ = Noting
