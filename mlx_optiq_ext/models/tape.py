"""Run a model block by block and keep the boundaries, so that it can be continued or differentiated anywhere.

A model is seen as an outer function (embedding, masks, final norm, head) with holes, the calls of its
blocks. The model's own ``__call__`` is the outer function: blocks are intercepted and either run, or
answered from the record. So every family that mlx-lm runs is handled by its own code. Knows nothing of
quantization; ``reverse`` differentiates the record.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.errors import UnsupportedModel
from mlx_optiq_ext.models.arrays import split_arrays
from mlx_optiq_ext.models.effects import Effects, Outcome, replay
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import intercepted
from mlx_optiq_ext.models.memory import BlockMemory
from mlx_optiq_ext.models.taps import HeadOverride, UnitTap
from mlx_optiq_ext.models.walk import Quantizable, quantizable_modules

__all__ = ["Node", "Tape", "logits_of"]


class Node(NamedTuple):
    """One call of one block, all windows at once."""

    block: int
    rebuild_inputs: Callable[[list[mx.array]], Any]
    rebuild_outputs: Callable[[list[mx.array]], Outcome]
    inputs: list[mx.array]
    outputs: list[mx.array]
    input_axes: list[int | None]
    """Per input the axis that counts windows, None where the input is the same for all."""
    output_axes: list[int | None]
    sources: list[tuple[int, int] | None]
    """Per input the (call, output) that it is, None where the outer function made it."""

    def window_inputs(self, window: int) -> list[mx.array]:
        """Inputs of one window, the window axis kept."""
        return _rows(self.inputs, self.input_axes, [window])

    def window_outputs(self, windows: Sequence[int]) -> list[mx.array]:
        """Outputs of some windows."""
        return _rows(self.outputs, self.output_axes, windows)


class Tape:
    """Record of one forward pass over equal windows.

    Args:
        model: Module tree; its blocks are loaded and released through ``memory``.
        tokens: int array (W, T), W windows of T tokens.
        memory: What makes a block's weights present; everything resident by default.
        call: Runs the model on tokens; given where it wants caches besides, and then no unit is watched.
    Owner thread: the one that builds it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: mx.array,
        memory: BlockMemory | None = None,
        call: Callable[[mx.array], Any] | None = None,
    ) -> None:
        self.model, self._call = model, call or model
        self.tokens = tokens
        self.memory = memory or BlockMemory()
        self.blocks = find_blocks(model)
        self.nodes: list[Node] = []
        self.tied_head: str | None = None
        """Path of the embedding that serves as head; known after :meth:`forward`."""
        modules = quantizable_modules(model) if call is None else {}
        self.paths = {id(module): path for path, module in modules.items()}
        vocab = max((m.weight.shape[0] for m in modules.values() if isinstance(m, nn.Embedding)), default=0)
        self.outside = [m for path, m in modules.items() if self.blocks.index_of(path) is None]
        heads = (m for m in self.outside if not isinstance(m, nn.Embedding))
        self.heads = frozenset(self.paths[id(m)] for m in heads if vocab and m.weight.shape[0] == vocab)
        self._modules = modules
        self._one_more: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = []
        self._block_index = {id(module): i for i, module in enumerate(self.blocks.modules)}

    @property
    def num_windows(self) -> int:
        """W."""
        return int(self.tokens.shape[0])

    def members(self, block: int) -> list[Quantizable]:
        """Quantizable modules of one block."""
        return [m for path, m in self._modules.items() if self.blocks.index_of(path) == block]

    def forward(self, on_call: Callable[[int], None] = lambda _: None) -> None:
        """Run all windows through all blocks, one block in memory at a time; evaluates the boundaries.

        Args:
            on_call: Called after each call of a block with the number of calls so far.
        Raises:
            UnsupportedModel: The model calls none of its blocks.
        """
        self.find_windows()
        self.nodes, origins = [], _Origins()

        def run(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = self._block_index[id(module)]
            given, rebuild_inputs = split_arrays((args, kwargs))
            sources = [origins.of(leaf) for leaf in given]
            inputs = [copy(leaf) for leaf in given]
            with self.memory.present(index):
                effects = Effects((args, kwargs))
                output = original(*args, **kwargs)
                made, rebuild_outputs = effects.after(output)
                mx.eval(made, inputs)
            if not self.nodes:
                self.memory.release_outside()
            outputs = [copy(leaf) for leaf in made]
            input_shapes, output_shapes = self._one_more[len(self.nodes)]
            axes = _grown_axes(input_shapes, inputs), _grown_axes(output_shapes, outputs)
            handed_through = {id(leaf): value for leaf, value in zip(given, inputs, strict=True)}
            origins.add(len(self.nodes), made, outputs, handed_through)
            self.nodes.append(Node(index, rebuild_inputs, rebuild_outputs, inputs, outputs, *axes, sources))
            on_call(len(self.nodes))
            return output

        with intercepted(self.blocks.modules, run):
            self._call(self.tokens)

    def find_windows(self) -> None:
        """Find out which axis counts windows at every boundary, without running anything.

        Raises:
            UnsupportedModel: The model calls none of its blocks.
        """
        self._one_more = self._shapes_of_one_more()

    def window_groups(self, call: int, arguments: Any, num_windows: int) -> Iterator[Any]:
        """Arguments of a block's call for all windows, again for a few windows at a time.

        Needs :meth:`find_windows` beforehand.

        Args:
            call: Which call of the forward pass this is.
            arguments: Its (args, kwargs), not changed by what is done with those yielded.
            num_windows: How many at a time.
        """
        given, rebuild = split_arrays(arguments)
        axes = _grown_axes(self._one_more[call][0], given)
        for start in range(0, self.num_windows, num_windows):
            group = range(start, min(start + num_windows, self.num_windows))
            yield rebuild(_rows([copy(leaf) for leaf in given], axes, group))

    def run_in_groups(self, call: int, block: Callable[..., Any], arguments: Any, num_windows: int) -> Any:
        """What a block returns for all windows, worked out for a few windows at a time; evaluated.

        Memory: the block's activations of those few windows only. Needs :meth:`find_windows` beforehand.
        """
        parts: list[list[mx.array]] = []
        for args, kwargs in self.window_groups(call, arguments, num_windows):
            effects = Effects((args, kwargs))
            made, rebuild = effects.after(block(*args, **kwargs))
            mx.eval(made)
            parts.append(made)
        joined = [
            column[0] if axis is None else mx.concatenate(list(column), axis=axis)
            for column, axis in zip(
                zip(*parts, strict=True), _grown_axes(self._one_more[call][1], parts[0]), strict=True
            )
        ]
        mx.eval(joined)
        return replay(arguments, rebuild(joined))

    def logits(self, window: int, head: HeadOverride | None = None) -> mx.array:
        """Logits (1, T, V) of one window, from the recorded blocks; lazy."""
        return self.outer(window, self.outputs_of(window), head=head)[0]

    def outputs_of(self, window: int) -> list[list[mx.array]]:
        """Recorded outputs of every block call for one window."""
        return [node.window_outputs([window]) for node in self.nodes]

    def outer(
        self,
        window: int,
        outputs: list[list[mx.array]],
        *,
        tap: UnitTap | None = None,
        head: HeadOverride | None = None,
    ) -> tuple[mx.array, list[list[mx.array]]]:
        """The outer function: logits and every block's inputs, given every block's outputs; lazy."""
        inputs: list[list[mx.array]] = []
        tap = tap or UnitTap(self.paths, self.heads, head=head)

        def answer(_: nn.Module, __: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs.append([copy(leaf) for leaf in split_arrays((args, kwargs))[0]])
            node = self.nodes[len(inputs) - 1]
            outcome = node.rebuild_outputs([copy(leaf) for leaf in outputs[len(inputs) - 1]])
            return replay((args, kwargs), outcome)

        with intercepted(self.blocks.modules, answer), intercepted(self.outside, tap):
            logits = logits_of(self._call(self.tokens[window : window + 1]))
        return logits, inputs

    def run_from(self, start: int, windows: Sequence[int]) -> mx.array:
        """Logits (len(windows), T, V) with every call before ``start`` answered from the record; lazy.

        The caller changes weights from call ``start`` on beforehand; the model must be resident.
        """
        recorded = [node.window_outputs(windows) for node in self.nodes[:start]]
        count = 0

        def answer(_: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal count
            count += 1
            if count <= len(recorded):
                return replay((args, kwargs), self.nodes[count - 1].rebuild_outputs(recorded[count - 1]))
            return original(*args, **kwargs)

        with intercepted(self.blocks.modules, answer):
            return logits_of(self._call(self.tokens[mx.array(list(windows))]))

    def _shapes_of_one_more(self) -> list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]:
        """Shapes at every boundary with one more window: what grew is the window axis. Evaluates nothing."""
        shapes: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = []

        def note(_: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs, effects = (
                [leaf.shape for leaf in split_arrays((args, kwargs))[0]],
                Effects((args, kwargs)),
            )
            output = original(*args, **kwargs)
            shapes.append((inputs, [leaf.shape for leaf in effects.after(output)[0]]))
            return output

        def watch(module: nn.Module, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if kwargs.pop("_as_linear", False):
                self.tied_head = self.paths[id(module)]
            return original(*args, **kwargs)

        with intercepted(self.blocks.modules, note), intercepted(self.outside, watch):
            self._call(mx.concatenate([self.tokens, self.tokens[:1]]))
        if not shapes:
            raise UnsupportedModel(f"{type(self.model).__module__} runs no block; use --method static")
        return shapes


class _Origins:
    """Which call made an array that the outer function hands on.

    Families change arrays in place (``h[1:] = ...``), which keeps the Python object: an object counts as a
    call's output only while it still has the value that the call gave it.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[mx.array, mx.array, tuple[int, int]]] = {}

    def of(self, leaf: mx.array) -> tuple[int, int] | None:
        """(call, output) that an array is, None where it is something else; evaluates."""
        if id(leaf) not in self._made:
            return None
        _, value, source = self._made[id(leaf)]
        return source if _same(leaf, value) else None

    def add(
        self, call: int, made: list[mx.array], values: list[mx.array], handed_through: dict[int, mx.array]
    ) -> None:
        """Note what a call made; an array that it only handed through keeps its origin."""
        for k, (leaf, value) in enumerate(zip(made, values, strict=True)):
            if id(leaf) not in handed_through or not _same(handed_through[id(leaf)], value):
                self._made[id(leaf)] = (leaf, value, (call, k))


def logits_of(output: Any) -> mx.array:
    """The logits in whatever a family's ``__call__`` returns."""
    found = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    assert isinstance(found, mx.array)
    return found


def _same(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and bool(mx.array_equal(one, other))


def _grown_axes(one_more: list[tuple[int, ...]], leaves: Iterable[mx.array]) -> list[int | None]:
    """The axis of every leaf that grew with one more window; None where none did."""
    return [
        next(
            (axis for axis, (big, small) in enumerate(zip(shape, leaf.shape, strict=True)) if big != small),
            None,
        )
        for shape, leaf in zip(one_more, leaves, strict=True)
    ]


def _rows(leaves: list[mx.array], axes: list[int | None], windows: Sequence[int]) -> list[mx.array]:
    rows = mx.array(list(windows))
    return [
        leaf if axis is None else mx.take(leaf, rows, axis=axis)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
