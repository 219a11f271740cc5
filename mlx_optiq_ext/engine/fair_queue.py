"""Who is next: sessions take turns, and within one the first comes first.

Knows names and waiting things, nothing of what they are. Called on the owner thread.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue in which no session waits for more than one thing of each other session."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._sessions.values())

    def __iter__(self) -> Iterator[T]:
        for waiting in self._sessions.values():
            yield from waiting

    def push(self, session: str, item: T) -> None:
        """Add behind everything of its session."""
        self._sessions.setdefault(session, deque()).append(item)

    def peek(self) -> T | None:
        """What :meth:`pop` would give; None where nothing waits."""
        for waiting in self._sessions.values():
            return waiting[0]
        return None

    def pop(self) -> T:
        """Take the next one; its session goes to the end of the line.

        Raises:
            KeyError: Nothing waits.
        """
        return self._take(next(iter(self._sessions), ""))

    def take(self, may: Callable[[T], bool]) -> T | None:
        """Take the first one in turn that may be taken now; a session's second waits for its first."""
        for session, waiting in self._sessions.items():
            if may(waiting[0]):
                return self._take(session)
        return None

    def _take(self, session: str) -> T:
        waiting = self._sessions.pop(session)
        item = waiting.popleft()
        if waiting:
            self._sessions[session] = waiting
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out everything that is not wanted any more."""
        gone: list[T] = []
        for session, waiting in list(self._sessions.items()):
            gone.extend(item for item in waiting if unwanted(item))
            left = deque(item for item in waiting if not unwanted(item))
            if left:
                self._sessions[session] = left
            else:
                del self._sessions[session]
        return gone
