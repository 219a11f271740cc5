"""Who may have which bytes: rows, prefixes and embeddings share what the weights leave.

Rows are counted with what they may grow to, embeddings with what they claimed; prefixes give way to both.
Knows no queue and no thread. Called by ``owner`` and ``engine`` on the owner thread.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.engine.admission import reserved_tokens
from mlx_optiq_ext.engine.batch import Batch
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.memory import server_head_room_nbytes
from mlx_optiq_ext.engine.prefix_cache import PrefixCache
from mlx_optiq_ext.engine.residents import Residents
from mlx_optiq_ext.engine.served import Loaded
from mlx_optiq_ext.errors import Overloaded

__all__ = ["Budget"]

_BUSY_RETRY_S = 5.0


class Budget:
    """Memory beside the weights.

    Args:
        limit_nbytes: Ceiling of weights, caches and activations.
        models: Those in memory.
        batches: Those that run, by model; read at every call.
        prefixes: The prefix cache.
    """

    def __init__(
        self, limit_nbytes: int, models: Residents, batches: Mapping[str, Batch], prefixes: PrefixCache
    ) -> None:
        self._limit = limit_nbytes - server_head_room_nbytes(limit_nbytes)
        self._models = models
        self._batches = batches
        self._prefixes = prefixes
        self._claimed = 0

    @property
    def rows_nbytes(self) -> int:
        """Of all rows' caches, as they are."""
        return sum(batch.nbytes for batch in self._batches.values())

    @property
    def left(self) -> int:
        """Bytes for rows and prefixes together."""
        return self._limit - self._models.weights_nbytes - self._claimed

    @property
    def is_shared(self) -> bool:
        """Whether rows or embeddings hold some of it, so that who finds no room may wait for more."""
        return self._claimed > 0 or any(batch.rows for batch in self._batches.values())

    def make_room(self, loaded: Loaded, batch: Batch, job: Job) -> bool:
        """Whether the rows fit with one more, after prefixes gave way."""
        others = sum(other.nbytes for other in self._batches.values() if other is not batch)
        needed = _rows_nbytes(loaded, [*batch.rows.values(), job]) + others
        if needed > self.left:
            return False
        self._prefixes.longest(batch.cache_key(job), job.prompt)  # what it will go on from goes last
        self._prefixes.shrink_to(min(self._prefixes.limit_nbytes, self.left - needed))
        return True

    @contextmanager
    def claimed(self, nbytes: int) -> Iterator[None]:
        """Hold bytes that are neither rows nor prefixes.

        Raises:
            Overloaded: Weights, rows and others that claimed leave less.
        """
        rows = sum(
            _rows_nbytes(loaded, list(batch.rows.values()))
            for name, batch in self._batches.items()
            if batch.rows and (loaded := self._models.get(name)) is not None
        )
        free = self.left - rows
        if nbytes > free:
            raise Overloaded(
                f"these inputs take {format_nbytes(nbytes)} while they are computed, and "
                f"{format_nbytes(max(0, free))} are left; ask again later, send shorter ones, or start the "
                "server with more --memory",
                retry_after_s=_BUSY_RETRY_S,
            )
        self._prefixes.shrink_to(min(self._prefixes.limit_nbytes, free - nbytes))
        self._claimed += nbytes
        try:
            yield
        finally:
            self._claimed -= nbytes

    def watch(self) -> None:
        """Where rows outgrew what they had room for: prefixes give way, then the newest row."""
        left = self.left - self.rows_nbytes
        if left >= self._prefixes.nbytes:
            return
        self._prefixes.shrink_to(max(0, left))
        if left < 0:
            running = [batch for batch in self._batches.values() if batch.rows]
            if not running:
                return
            max(running, key=lambda each: each.nbytes).fail_newest(
                Overloaded(
                    "the answers that run took all memory; this one ends, and can be asked for again",
                    retry_after_s=_BUSY_RETRY_S,
                )
            )


def _rows_nbytes(loaded: Loaded, rows: list[Job]) -> int:
    """What rows may take before they are looked at again; they are padded to the longest of them."""
    lengths = [len(row.prompt) + reserved_tokens(row) for row in rows]
    return len(lengths) * loaded.sizes.nbytes(max(lengths))
