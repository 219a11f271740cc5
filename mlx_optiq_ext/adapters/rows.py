"""Which adapter each row of a batch uses.

A row's adapter travels with its caches: :class:`AdapterRow` stands behind them in the list that mlx-lm
merges, extends, filters and extracts, so it is right whenever they are. :class:`RoutedModel` takes it out
again and says it to the routed layers (``layers``) while the model runs. Owner thread only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

__all__ = ["BASE", "AdapterRow", "RoutedModel", "Selection", "selected", "selection"]

BASE = 0
"""Slot of the base model: no adapter."""


class AdapterRow:
    """The slots of the rows of one batch, in mlx-lm's cache protocol.

    Args:
        slots: One per row.
    """

    def __init__(self, slots: Sequence[int] = (BASE,)) -> None:
        self.slots = tuple(slots)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """Nothing to evaluate."""
        return ()

    @property
    def nbytes(self) -> int:
        """Nothing is held."""
        return 0

    def empty(self) -> bool:
        """Whether there are no rows."""
        return not self.slots

    def is_trimmable(self) -> bool:
        """A row keeps its adapter whatever is forgotten."""
        return True

    def trim(self, n: int) -> int:
        """Forget tokens: nothing changes."""
        return n

    def size(self) -> int:
        """No tokens."""
        return 0

    def prepare(self, **_: Any) -> None:
        """Padding does not matter."""

    def finalize(self) -> None:
        """Nothing to do."""

    @classmethod
    def merge(cls, rows: Sequence["AdapterRow"]) -> "AdapterRow":
        """Rows side by side."""
        return cls([slot for row in rows for slot in row.slots])

    def extend(self, other: "AdapterRow") -> None:
        """More rows behind these."""
        self.slots += other.slots

    def filter(self, keep: Sequence[int]) -> None:
        """Only these rows, in this order."""
        self.slots = tuple(self.slots[k] for k in keep)

    def extract(self, index: int) -> "AdapterRow":
        """One row."""
        return AdapterRow([self.slots[index]])


class Selection:
    """What the routed layers ask while the model runs.

    Args:
        slots: One per row of the input.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self.experts: mx.array | None = None
        """Experts of all tokens, as the module that holds expert layers was given them."""

    @property
    def only(self) -> int | None:
        """The slot of all rows; None where they differ."""
        return self.slots[0] if len(set(self.slots)) == 1 else None

    def per_item(self, count: int) -> mx.array:
        """Slots of ``count`` items that the rows were flattened to, row by row, (count,) uint32."""
        rows = mx.array(self.slots, dtype=mx.uint32)
        return mx.repeat(rows, count // len(self.slots))


_current: Selection | None = None


def selection() -> Selection | None:
    """Of the model that is running now; None where no row uses an adapter."""
    return _current


@contextmanager
def selected(slots: Sequence[int]) -> Iterator[None]:
    """Say within the block which adapter every row uses."""
    global _current
    before, _current = _current, Selection(slots) if any(slot != BASE for slot in slots) else None
    try:
        yield
    finally:
        _current = before


class RoutedModel:
    """A model whose caches end in an :class:`AdapterRow`.

    Args:
        model: As mlx-lm loads it, with routed layers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: mx.array, cache: list[Any], **named: Any) -> Any:
        """Run the model; lazy, and what is lazy has its adapters already."""
        with selected(cache[-1].slots):
            return self.model(tokens, cache=cache[:-1], **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)
