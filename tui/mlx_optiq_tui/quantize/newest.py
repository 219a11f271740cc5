"""Computing in a thread, one thing at a time, for widgets that have to answer keys meanwhile.

Knows no subject. Used by the panes of the quantize screen.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from textual.widget import Widget

__all__ = ["Newest"]

T = TypeVar("T")


class Newest(Generic[T]):
    """Of what is asked for while something is computed, only the newest is computed next.

    Belongs to the event loop; what is used never becomes older.

    Args:
        owner: What is computed for it ends with it.
        use: Takes every result, on the event loop.
    """

    def __init__(self, owner: Widget, use: Callable[[T], None]) -> None:
        self._owner, self._use = owner, use
        self._next: Callable[[], T] | None = None
        self._runs = self._computes = False

    def ask(self, compute: Callable[[], T]) -> None:
        """Compute in a thread, after what is computed now and in place of what waits."""
        self._next = compute
        if not self._runs:
            self._runs = True
            self._owner.run_worker(self._run())

    @property
    def is_busy(self) -> bool:
        """Whether something is computed, or waits."""
        return self._computes or self._next is not None

    def is_wanted(self) -> bool:
        """Whether nothing newer waits; long computations ask now and then."""
        return self._computes and self._next is None

    async def _run(self) -> None:
        try:
            while (compute := self._next) is not None:
                self._next, self._computes = None, True
                result = await asyncio.to_thread(compute)
                self._computes = False
                if not self._is_alive():
                    return
                self._use(result)
        finally:
            self._runs = self._computes = False

    def _is_alive(self) -> bool:
        """Whether the owner can still draw; what is being removed is displayed no longer."""
        return self._owner.is_attached and self._owner.display
