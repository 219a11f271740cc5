"""The caches of one sequence, kept so that later requests can go on from parts of it.

Most caches can forget their newest tokens; state-space layers and full sliding windows cannot. Of these a
snapshot keeps checkpoints, taken where a later request is likely to branch. Arrays are shared, not copied:
MLX copies a buffer when one of its holders writes to it.

Knows caches, not requests. Called on the owner thread only.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import CacheList

__all__ = ["Checkpoint", "Snapshot", "checkpoint_of", "forgets", "shared_length"]

Checkpoint = tuple[Any, ...]
"""Per cache of the model: a copy, or None where the cache itself can be taken back."""


class Snapshot:
    """Caches after ``tokens``.

    Args:
        tokens: All tokens that the caches have seen, (L,) int32.
        caches: One per entry of ``make_prompt_cache(model)``; owned from here on.
        checkpoints: By length, at most L.
    """

    def __init__(
        self, tokens: Sequence[int], caches: list[Any], checkpoints: Mapping[int, Checkpoint] | None = None
    ) -> None:
        self.tokens: npt.NDArray[np.int32] = np.asarray(tokens, dtype=np.int32)
        self.caches = caches
        self.checkpoints = dict(sorted((checkpoints or {}).items()))
        mx.eval([cache.state for cache in caches])
        self.nbytes = sum(cache.nbytes for cache in caches) + sum(
            cache.nbytes for kept in self.checkpoints.values() for cache in kept if cache is not None
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def usable(self, length: int) -> int:
        """The longest prefix, at most ``length`` tokens, that :meth:`restore` can give."""
        if length >= len(self):
            return len(self)
        if all(cache.is_trimmable() for cache in self.caches):
            return length
        return max((at for at in self.checkpoints if at <= length), default=0)

    def restore(self, length: int) -> list[Any]:
        """Caches after the first ``length`` tokens; the snapshot stays as it is.

        Args:
            length: An answer of :meth:`usable`.
        """
        if length == len(self):
            return copy.deepcopy(self.caches)
        kept = self.checkpoints.get(length)
        return [
            _taken_back(cache, len(self) - length)
            if kept is None or kept[k] is None
            else copy.deepcopy(kept[k])
            for k, cache in enumerate(self.caches)
        ]

    def replaces(self, other: "Snapshot") -> bool:
        """Whether everything that ``other`` can give, this one can."""
        if len(other) > len(self) or not np.array_equal(self.tokens[: len(other)], other.tokens):
            return False
        return all(self.usable(length) == length for length in (len(other), *other.checkpoints))


def checkpoint_of(caches: Sequence[Any]) -> Checkpoint:
    """What of these caches cannot be taken back later, evaluated."""
    kept = tuple(copy.deepcopy(cache) if forgets(cache) else None for cache in caches)
    mx.eval([cache.state for cache in kept if cache is not None])
    return kept


def forgets(cache: Any) -> bool:
    """Whether a cache may lose what a rewind would need: states, and windows that slide."""
    if isinstance(cache, CacheList):
        return any(forgets(inner) for inner in cache.caches)
    if not cache.is_trimmable():
        return True
    layout = getattr(cache, "layout", None)
    return getattr(cache, "max_size", None) is not None or (layout is not None and layout.window is not None)


def shared_length(left: npt.NDArray[np.int32], right: npt.NDArray[np.int32]) -> int:
    """Tokens at the beginning that two sequences share."""
    shortest = min(len(left), len(right))
    differs = np.flatnonzero(left[:shortest] != right[:shortest])
    return int(differs[0]) if differs.size else shortest


def _taken_back(cache: Any, num_tokens: int) -> Any:
    taken = copy.deepcopy(cache)
    taken.trim(num_tokens)
    return taken
