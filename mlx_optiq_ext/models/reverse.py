"""Differentiate a recorded forward pass in reverse, one block in memory, with recomputation.

Gradients cross block boundaries where a call's input is an earlier call's output; what a family computes
between blocks is differentiated through the outer function. Yields, per block, what each quantizable
module saw and the gradient of its output. Called by ``measure``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_optiq_ext.models.effects import Effects
from mlx_optiq_ext.models.intercept import constant_indices, intercepted
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.taps import Capture, UnitTap
from mlx_optiq_ext.models.walk import Quantizable

__all__ = ["NodeCaptures", "Reverse"]

Pick = Callable[[mx.array, list[list[mx.array]]], mx.array]


class NodeCaptures(NamedTuple):
    """All captures of one call of one block (``block`` None: modules outside of blocks)."""

    block: int | None
    items: list[list[Capture]]
    """One list per item; items count windows within samples: ``item = sample · W + window``."""


class Reverse:
    """One reverse pass over a tape.

    Args:
        tape: Recorded by :meth:`Tape.forward`.
        cotangent: ``(item, logits (1, T, V)) → d loss / d logits`` of the same shape.
        samples: Passes over every window, so that each draws its own labels.
    """

    def __init__(self, tape: Tape, cotangent: Callable[[int, mx.array], mx.array], samples: int = 1) -> None:
        self._tape = tape
        self._cotangent = cotangent
        self._windows = [w for _ in range(samples) for w in range(tape.num_windows)]
        self._grads: list[list[list[mx.array | None]]] = [
            [[None] * len(node.outputs) for _ in self._windows] for node in tape.nodes
        ]
        self._outside: list[list[tuple[int, int, mx.array]]] = [[] for _ in self._windows]
        self._sources: dict[tuple[int, int], list[int]] = {}

    def run(self) -> Iterator[NodeCaptures]:
        """Yield captures from the last block call to the first, then those outside of blocks; evaluated.

        A block is in memory while its captures are handled by the caller.
        """
        d_logits = [self._tail(item) for item in range(len(self._windows))]
        self._tape.memory.release_outside()
        for n in reversed(range(len(self._tape.nodes))):
            block = self._tape.nodes[n].block
            with self._tape.memory.present(block):
                captures = [self._through_block(n, item) for item in range(len(self._windows))]
                self._grads[n] = []
                yield NodeCaptures(block, captures)
        yield NodeCaptures(
            None, [self._outside_captures(item, d_logits[item]) for item in range(len(d_logits))]
        )

    def _tail(self, item: int) -> mx.array:
        """Gradients of the outputs that the tail reads; returns d loss / d logits."""
        outputs = self._tape.outputs_of(self._windows[item])
        logits = self._tape.outer(self._windows[item], outputs)[0]
        d_logits = mx.stop_gradient(self._cotangent(item, logits))
        mx.eval(d_logits)
        self._through_outer((-1, 0), len(self._tape.nodes), item, lambda out, _: out, d_logits)
        return d_logits

    def _through_block(self, n: int, item: int) -> list[Capture]:
        """Recompute one block on one window, differentiate it, hand its input gradients down; evaluates."""
        node = self._tape.nodes[n]
        out_grads = self._grads[n][item]
        if all(g is None for g in out_grads):
            return []
        inputs = node.window_inputs(self._windows[item])
        free = [k for k, leaf in enumerate(inputs) if node.input_axes[k] is not None and _is_float(leaf)]
        block, members = self._tape.blocks.modules[node.block], self._tape.members(node.block)

        def run(tap: UnitTap, free_inputs: list[mx.array]) -> list[mx.array]:
            full = [copy(leaf) for leaf in inputs]
            for k, leaf in zip(free, free_inputs, strict=True):
                full[k] = leaf
            args, kwargs = node.rebuild_inputs(full)
            effects = Effects((args, kwargs))
            with self._tapped(members, tap):
                return effects.after(block(*args, **kwargs))[0]

        shapes = UnitTap(self._tape.paths)
        run(shapes, [inputs[k] for k in free])
        taps: list[UnitTap] = []

        def differentiable(*arrays: mx.array) -> list[mx.array]:
            taps.append(UnitTap(self._tape.paths, deltas=list(arrays[len(free) :])))
            out = run(taps[-1], list(arrays[: len(free)]))
            return [leaf for leaf, g in zip(out, out_grads, strict=True) if g is not None]

        deltas = [mx.zeros(shape, dtype) for shape, dtype in shapes.output_shapes]
        primals = [*(inputs[k] for k in free), *deltas]
        grads = _gradients(differentiable, primals, [g for g in out_grads if g is not None])
        captures = _captures(taps[-1], grads[len(free) :])
        mx.eval(grads, [[c.call.x, c.call.experts] for c in captures])
        for k, gradient in zip(free, grads[: len(free)], strict=True):
            self._pass_down(n, k, item, gradient)
        return captures

    def _tapped(self, members: list[Quantizable], tap: UnitTap) -> AbstractContextManager[None]:
        """Let the tap see what a block computes while the context lasts."""
        return intercepted(members, tap)

    def _pass_down(self, n: int, position: int, item: int, gradient: mx.array) -> None:
        """Add the gradient of one input of call ``n`` to whatever made it."""
        source = self._tape.nodes[n].sources[position]
        if source is not None:
            self._add(*source, item, gradient)
            return
        self._outside[item].append((n, position, gradient))
        self._through_outer((n, position), n, item, lambda _, inputs: inputs[n][position], gradient)

    def _through_outer(
        self, key: tuple[int, int], before: int, item: int, pick: Pick, gradient: mx.array
    ) -> None:
        """Carry a gradient through the outer function to earlier block outputs that it reads."""
        if key not in self._sources:
            ones = mx.random.normal(gradient.shape, key=mx.random.key(0)).astype(gradient.dtype)
            reached = self._outer_vjp(list(range(before)), item, pick, ones)
            self._sources[key] = sorted({m for m, _, g in reached if bool(mx.any(g != 0))})
        for m, k, leaf_gradient in self._outer_vjp(self._sources[key], item, pick, gradient):
            self._add(m, k, item, leaf_gradient)

    def _outer_vjp(
        self, sources: list[int], item: int, pick: Pick, gradient: mx.array
    ) -> list[tuple[int, int, mx.array]]:
        window = self._windows[item]
        outputs = self._tape.outputs_of(window)
        where = [(m, k) for m in sources for k, leaf in enumerate(outputs[m]) if _is_float(leaf)]
        if not where:
            return []

        def outer(*free: mx.array) -> list[mx.array]:
            full = [list(leaves) for leaves in outputs]
            for (m, k), leaf in zip(where, free, strict=True):
                full[m][k] = leaf
            return [pick(*self._tape.outer(window, full))]

        grads = _gradients(outer, [outputs[m][k] for m, k in where], [gradient])
        mx.eval(grads)
        return [(m, k, g) for (m, k), g in zip(where, grads, strict=True)]

    def _outside_captures(self, item: int, d_logits: mx.array) -> list[Capture]:
        """Captures of embeddings and projections outside of blocks; the head is not among them."""
        window = self._windows[item]
        outputs = self._tape.outputs_of(window)
        cotangents = self._outside[item]
        shapes = UnitTap(self._tape.paths, self._tape.heads)
        self._tape.outer(window, outputs, tap=shapes)
        taps: list[UnitTap] = []

        def outer(*deltas: mx.array) -> list[mx.array]:
            taps.append(UnitTap(self._tape.paths, self._tape.heads, list(deltas)))
            logits, inputs = self._tape.outer(window, outputs, tap=taps[-1])
            return [logits, *(inputs[n][k] for n, k, _ in cotangents)]

        zeros = [mx.zeros(shape, dtype) for shape, dtype in shapes.output_shapes]
        if not zeros:
            return []
        grads = _gradients(outer, zeros, [d_logits, *(g for _, _, g in cotangents)])
        captures = _captures(taps[-1], grads)
        mx.eval(grads, [[c.call.x, c.call.experts] for c in captures])
        return captures

    def _add(self, m: int, k: int, item: int, gradient: mx.array) -> None:
        held = self._grads[m][item][k]
        self._grads[m][item][k] = gradient if held is None else held + gradient


def _gradients(
    function: Callable[..., list[mx.array]], primals: list[mx.array], cotangents: list[mx.array]
) -> list[mx.array]:
    """Gradients of Σ output · cotangent; lazy.

    Not ``mx.vjp``: it takes one cotangent for an array that is several outputs, instead of their sum.
    """

    def total(arrays: list[mx.array]) -> mx.array:
        products = [mx.sum(y * g) for y, g in zip(function(*arrays), cotangents, strict=True)]
        return sum(products[1:], products[0])

    with constant_indices():
        gradients: list[mx.array] = mx.grad(total)(primals)
    return gradients


def _captures(tap: UnitTap, grads: list[mx.array]) -> list[Capture]:
    return [Capture(call, g) for call, g in zip(tap.calls, grads, strict=True)]


def _is_float(leaf: Any) -> bool:
    return bool(mx.issubdtype(leaf.dtype, mx.floating))
