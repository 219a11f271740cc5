"""What a training loop asks of a loss: the border between ``loop`` and ``sft`` and ``dpo``."""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import msgspec

from mlx_optiq_ext.errors import MeasurementError

__all__ = ["Item", "NotFinite", "Objective", "Sums"]

Item = TypeVar("Item", contravariant=True)


class NotFinite(MeasurementError):
    """A loss or a gradient is no number; the update was not made."""


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """A loss and what goes with it, summed over items."""

    loss: float = 0.0
    weight: int = 0
    num_tokens: int = 0
    values: dict[str, float] = {}

    def plus(self, other: "Sums") -> "Sums":
        """Both together."""
        names = dict.fromkeys((*self.values, *other.values))
        return Sums(
            loss=self.loss + other.loss,
            weight=self.weight + other.weight,
            num_tokens=self.num_tokens + other.num_tokens,
            values={name: self.values.get(name, 0.0) + other.values.get(name, 0.0) for name in names},
        )


class Objective(Protocol, Generic[Item]):
    """A loss over items; sums in place of means, so that parts of an update add up exactly."""

    def length(self, item: Item) -> int:
        """Tokens of an item, by which items are put together."""
        ...

    def where(self, item: Item) -> str:
        """File and line of an item."""
        ...

    def collate(self, items: Sequence[Item]) -> Any:
        """A batch of the items, with ``num_tokens`` (read) and ``weight`` (what the sum is divided by)."""
        ...

    def sums(self, batch: Any) -> tuple[mx.array, dict[str, mx.array]]:
        """Summed loss, and other sums to be reported; float32 scalars, lazy."""
        ...
