"""Which weights are in memory: all of them, or one block at a time.

Lazy arrays of mlx keep what they read once evaluated. In streaming mode a block's parameters are replaced
by fresh lazy ones after use, so the evaluated ones are freed and the next visit reads the file again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import find_blocks

__all__ = ["BlockMemory", "StreamedMemory"]


class BlockMemory:
    """Everything stays resident."""

    @contextmanager
    def present(self, block: int) -> Iterator[None]:  # noqa: ARG002
        """Hold one block's weights while the body runs."""
        yield

    def release_outside(self) -> None:
        """Let go of what is not in a block (embedding, head): it will not be needed for some time."""


class StreamedMemory(BlockMemory):
    """One block resident: weights are read when a block runs and dropped after.

    Args:
        model: The model in use; its parameters are replaced in place.
        fresh: Builds the same model again with lazy weights of the wanted type.
    """

    def __init__(self, model: nn.Module, fresh: Callable[[], nn.Module]) -> None:
        self._model = model
        self._fresh = fresh
        self._blocks = find_blocks(model)
        self._depth = 0
        self._pool: dict[str, mx.array] = {}

    @contextmanager
    def present(self, block: int) -> Iterator[None]:
        """Evaluate one block's weights for the body, then give the block fresh lazy ones."""
        module = self._blocks.modules[block]
        mx.eval(module.parameters())
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._refresh(block)

    def release_outside(self) -> None:
        """Give everything outside of blocks fresh lazy weights."""
        inside = tuple(f"{self._blocks.prefix}.{block}." for block in range(len(self._blocks)))
        self._renew(self._model, "", lambda name: not name.startswith(inside))

    def _refresh(self, block: int) -> None:
        prefix = f"{self._blocks.prefix}.{block}."
        self._renew(self._blocks.modules[block], prefix, lambda name: name.startswith(prefix))

    def _renew(self, module: nn.Module, prefix: str, is_own: Callable[[str], bool]) -> None:
        """Replace a module's evaluated parameters by lazy ones, each of which serves once."""
        if not any(is_own(name) for name in self._pool):
            self._pool = dict(named_arrays(self._fresh().parameters()))
        own = [name for name in self._pool if is_own(name)]
        lazy = [(name[len(prefix) :], self._pool.pop(name)) for name in own]
        module.update(tree_unflatten(lazy))
        mx.clear_cache()
