"""The thread that turns requests into tokens: templates, tokenizers and grammars, one after the other.

Knows models only as what it is given. Made by ``engine``.
"""

import logging
import queue
import threading
from collections.abc import Callable

from mlx_optiq_ext.engine.openings import Opening
from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.engine.settle import attempt

__all__ = ["PromptThread"]

_log = logging.getLogger(__name__)


class PromptThread:
    """Runs what needs a model's tokenizer and none of its arrays.

    Args:
        owner: Opens models.
        opened: Called with every model that was opened, on the owner thread.
    """

    def __init__(self, owner: Owner, opened: Callable[[Loaded], None]) -> None:
        self._owner = owner
        self._opened = opened
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="optiq-prompts", daemon=True).start()

    def stop(self) -> None:
        """End after what was given before."""
        self._tasks.put(None)

    def run(
        self,
        spec: ModelSpec,
        then: Callable[[Loaded], None],
        otherwise: Callable[[Exception], None],
        *,
        first: Callable[[Loaded], None] = lambda _: None,
        has_left: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run ``then`` here with the model, loaded until that is done.

        Where the model needs the memory of others that answer requests, it waits for these.

        Args:
            otherwise: Told what any of them raised.
            first: Run before, on the owner thread.
            has_left: Whether nobody waits for it any more; asked on the owner thread while it waits.
        """

        def opened(loaded: Loaded) -> None:
            try:
                self._opened(loaded)
                first(loaded)
            except BaseException:
                self._owner.let_go(spec.name)
                raise
            self._tasks.put(lambda: prepare(loaded))

        def prepare(loaded: Loaded) -> None:
            attempt(lambda: then(loaded), otherwise)
            self._owner.call(lambda: self._owner.let_go(spec.name))

        opening = Opening(spec, opened, otherwise, has_left)
        self._owner.call(lambda: self._owner.openings.add(opening))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            attempt(task, self._lost)

    def _lost(self, error: Exception) -> None:
        """A task could not even tell its error; the thread goes on for the others."""
        _log.error("a request was lost between threads", exc_info=error)
