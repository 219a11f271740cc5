"""Prefixes that were computed already, shared by all sessions; the least recently used go first.

A key separates what must never be shared (model, adapter content, KV storage, images). Knows snapshots, not
requests or files; ``disk_tier`` is what lies under it. Called on the owner thread only.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from mlx_optiq_ext.engine.snapshot import Snapshot, shared_length
from mlx_optiq_ext.types.status import PrefixCacheStatus

__all__ = ["LowerTier", "PrefixCache", "Reuse"]

_LEAST_TOKENS = 8
"""Shorter prefixes cost more to restore than to compute."""


class Reuse:
    """A prefix that can be gone on from.

    Args:
        snapshot: Where it comes from.
        length: Tokens of it; at least one.
    """

    def __init__(self, snapshot: Snapshot, length: int) -> None:
        self.snapshot = snapshot
        self.length = length


class LowerTier(Protocol):
    """Where snapshots go when memory is short, and come back from."""

    def best(self, key: str, tokens: np.ndarray, more_than: int) -> Reuse | None:
        """A stored prefix with more usable tokens than ``more_than``."""

    def keep(self, key: str, snapshot: Snapshot) -> None:
        """Store a snapshot that is about to be dropped."""

    def clear(self) -> int:
        """Drop everything; the bytes that were held."""

    def held(self) -> tuple[int, int]:
        """Entries and bytes."""


class _Counts(msgspec.Struct):
    lookups: int = 0
    hits: int = 0
    reused_tokens: int = 0
    looked_up_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """Snapshots in memory, the least recently used first to go.

    Args:
        limit_nbytes: Ceiling; 0 keeps nothing.
        lower: What takes what does not fit, and is asked where memory has less.
    """

    def __init__(self, limit_nbytes: int, lower: LowerTier | None = None) -> None:
        self.limit_nbytes = limit_nbytes
        self._lower = lower
        self._entries: list[tuple[str, Snapshot]] = []
        """Least recently used first."""
        self._counts = _Counts()
        self.version = 0
        """Counts what was put in."""

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots in memory."""
        return sum(snapshot.nbytes for _, snapshot in self._entries)

    def find(self, key: str, tokens: Sequence[int], live: Callable[[int], Reuse | None]) -> Reuse | None:
        """The longest prefix at hand; at least one token is left to compute.

        Args:
            key: What the prefix depends on besides its tokens.
            tokens: Of the whole prompt.
            live: Asked for a longer prefix among running rows than the number it gets.
        """
        wanted = np.asarray(tokens[:-1], dtype=np.int32)
        found = self._best(key, wanted)
        have = found.length if found else 0
        found = live(have) or found
        have = found.length if found else 0
        if self._lower is not None:
            found = self._lower.best(key, wanted, have) or found
        self._counts.lookups += 1
        self._counts.looked_up_tokens += len(tokens)
        if found is None or found.length < _LEAST_TOKENS:
            return None
        self._counts.hits += 1
        self._counts.reused_tokens += found.length
        return found

    def longest(self, key: str, tokens: Sequence[int]) -> int:
        """Tokens of a prompt that are at hand in memory; they count as just used, and not as a lookup."""
        found = self._best(key, np.asarray(tokens[:-1], dtype=np.int32))
        return found.length if found else 0

    def put(self, key: str, snapshot: Snapshot) -> None:
        """Keep a snapshot; those that it replaces go, then the least recently used."""
        if self.limit_nbytes <= 0 or len(snapshot) < _LEAST_TOKENS:
            return
        if any(known == key and old.replaces(snapshot) for known, old in self._entries):
            return
        self._entries = [
            (known, old) for known, old in self._entries if known != key or not snapshot.replaces(old)
        ]
        self._entries.append((key, snapshot))
        self.version += 1
        self.shrink_to(self.limit_nbytes)

    def shrink_to(self, nbytes: int) -> int:
        """Drop the least recently used until no more than ``nbytes`` are held; the bytes that went.

        Nothing is written now, for rows wait: what :meth:`flush` wrote before is still on disk.
        """
        before = held = self.nbytes
        while self._entries and held > nbytes:
            _, snapshot = self._entries.pop(0)
            held -= snapshot.nbytes
            self._counts.evictions += 1
        return before - held

    def flush(self, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Hand everything to the lower tier, newest last; memory keeps it too.

        Args:
            go_on: Asked before each; somebody may wait.
        Returns:
            Whether everything was.
        """
        if self._lower is not None:
            for key, snapshot in self._entries:
                if not go_on():
                    return False
                self._lower.keep(key, snapshot)
        return True

    def forget(self, prefix: str) -> None:
        """Drop every entry whose key begins with ``prefix``: its model is gone from memory."""
        for key, snapshot in self._entries:
            if key.startswith(prefix) and self._lower is not None:
                self._lower.keep(key, snapshot)
        self._entries = [entry for entry in self._entries if not entry[0].startswith(prefix)]

    def clear(self) -> int:
        """Drop everything, below too; the bytes that were held."""
        held = self.nbytes + (self._lower.clear() if self._lower is not None else 0)
        self._entries.clear()
        return held

    def status(self) -> PrefixCacheStatus:
        """What is held, and how often it helped."""
        disk_entries, disk_nbytes = self._lower.held() if self._lower is not None else (0, 0)
        return PrefixCacheStatus(
            entries=len(self._entries),
            nbytes=self.nbytes,
            limit_nbytes=self.limit_nbytes,
            disk_entries=disk_entries,
            disk_nbytes=disk_nbytes,
            **msgspec.structs.asdict(self._counts),
        )

    def _best(self, key: str, wanted: np.ndarray) -> Reuse | None:
        """The entry with the longest usable prefix, marked as just used."""
        best, most = -1, 0
        for k, (known, snapshot) in enumerate(self._entries):
            if known != key:
                continue
            length = snapshot.usable(shared_length(snapshot.tokens, wanted))
            if length > 0 and length >= most:
                best, most = k, length
        if best < 0:
            return None
        entry = self._entries.pop(best)
        self._entries.append(entry)
        return Reuse(entry[1], most)
