"""The thread that turns requests into tokens: templates, tokenizers and grammars, one after the other.

Knows models only as what it is given. Made by ``engine``.
"""

import logging
import queue
import threading
from collections.abc import Callable

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
    ) -> None:
        """Run ``then`` here with the model, loaded until that is done.

        Args:
            otherwise: Told what any of them raised.
            first: Run before, on the owner thread.
        """

        def open_model() -> None:
            loaded = self._owner.open(spec)
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

        self._owner.call(lambda: attempt(open_model, otherwise))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            attempt(task, self._lost)

    def _lost(self, error: Exception) -> None:
        """A task could not even tell its error; the thread goes on for the others."""
        _log.error("a request was lost between threads", exc_info=error)
