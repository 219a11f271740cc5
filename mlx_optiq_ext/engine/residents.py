"""The models in memory: opened when they are asked for, the least recently used make room.

Knows sizes and names, not requests: who is busy is told. Called by ``owner`` on the owner thread.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator

import mlx.core as mx

from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.engine.memory import server_head_room_nbytes
from mlx_optiq_ext.engine.served import Loaded, ModelSpec, NoRoom, load
from mlx_optiq_ext.errors import Overloaded
from mlx_optiq_ext.types.progress import ProgressSink
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["Residents"]

_BUSY_RETRY_S = 5.0
_log = logging.getLogger(__name__)


class Residents:
    """Loaded models.

    Args:
        options: Of the server.
        limit_nbytes: Ceiling of weights, caches and activations.
        progress: Of loading.
        on_close: Called with a model before it goes.
    """

    def __init__(
        self,
        options: ServeOptions,
        limit_nbytes: int,
        progress: ProgressSink,
        on_close: Callable[[Loaded], None],
    ) -> None:
        self._options = options
        self._limit = limit_nbytes - server_head_room_nbytes(limit_nbytes)
        self._progress = progress
        self._on_close = on_close
        self._loaded: dict[str, Loaded] = {}
        """Least recently used first."""
        self._needs: dict[str, int] = {}
        """Bytes that models take which did not fit once: one that waits is not read again and again."""

    @property
    def names(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(self._loaded)

    def __iter__(self) -> Iterator[Loaded]:
        return iter(self._loaded.values())

    @property
    def weights_nbytes(self) -> int:
        """Of all of them."""
        return sum(loaded.weights_nbytes for loaded in self._loaded.values())

    def get(self, name: str) -> Loaded | None:
        """A loaded model; None where it is not."""
        return self._loaded.get(name)

    def open(self, spec: ModelSpec, busy: Callable[[], Collection[str]]) -> Loaded:
        """The model, loaded now if it is not.

        Args:
            busy: Names of models that must stay.
        Raises:
            NoRoom: It would not fit if it were alone; nothing was unloaded for it.
            Overloaded: It would fit if busy models went.
        """
        known = self._loaded.pop(spec.name, None)
        if known is not None:
            self._loaded[spec.name] = known
            return known
        loaded = self._loaded[spec.name] = self._load(spec, busy)
        self._share()
        _log.info("%s: context %d tokens", spec.name, loaded.context)
        return loaded

    def close(self, name: str) -> None:
        """Drop a model; nothing happens where it is not loaded."""
        gone = self._loaded.pop(name, None)
        if gone is None:
            return
        self._on_close(gone)
        del gone
        mx.clear_cache()
        self._share()
        _log.info("unloaded %s", name)

    def _load(self, spec: ModelSpec, busy: Callable[[], Collection[str]]) -> Loaded:
        began = time.monotonic()
        loaded: Loaded | None = None
        self._make_room(spec, busy())
        while True:
            try:
                # A model that is open already and lacks only the memory for a context is not read twice.
                loaded = loaded or load(
                    spec, self._options, self._limit - self.weights_nbytes, self._progress
                )
                loaded.require_context(self._limit - self.weights_nbytes - loaded.weights_nbytes)
                break
            except NoRoom as error:
                if not self._needs.get(spec.name, 0) < error.nbytes <= self._limit:
                    raise
                self._needs[spec.name] = error.nbytes
                self._make_room(spec, busy())
        _log.info(
            "loaded %s in %.1f s: %s of weights",
            spec.name,
            time.monotonic() - began,
            format_nbytes(loaded.weights_nbytes),
        )
        return loaded

    def _make_room(self, spec: ModelSpec, stay: Collection[str]) -> None:
        """Unload what is idle, as far as a model is known to need it.

        Raises:
            Overloaded: That would not be enough; nothing was unloaded.
        """
        needed = self._needs.get(spec.name, 0)
        busy = sum(loaded.weights_nbytes for name, loaded in self._loaded.items() if name in stay)
        if busy and needed + busy > self._limit:
            raise Overloaded(
                f"{spec.name} needs the memory of a model that is answering requests",
                retry_after_s=_BUSY_RETRY_S,
            )
        for name in [name for name in self._loaded if name not in stay]:
            if needed + self.weights_nbytes > self._limit:
                self.close(name)

    def _share(self) -> None:
        """Let every model serve the context that fits beside the weights that are here now."""
        for loaded in self._loaded.values():
            loaded.limit_context(self._limit - self.weights_nbytes)
