"""The thread that owns MLX: loads models, admits jobs, steps batches, and survives what fails.

Everything that touches an array runs here, in this order, forever: commands, admission, one step per batch,
memory. Callers send closures and get plain values. Made by ``engine``.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

import mlx.core as mx

from mlx_optiq_ext.engine.admission import may_join, no_room
from mlx_optiq_ext.engine.batch import Batch
from mlx_optiq_ext.engine.budget import Budget
from mlx_optiq_ext.engine.counters import Counters
from mlx_optiq_ext.engine.fair_queue import FairQueue
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.openings import Openings
from mlx_optiq_ext.engine.prefix_cache import PrefixCache
from mlx_optiq_ext.engine.residents import Residents
from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.errors import EngineError, EngineStopped, Overloaded
from mlx_optiq_ext.types.progress import ProgressSink
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["Owner"]

_MEMORY_EVERY = 32
_TICK_S = 0.5
_BUSY_RETRY_S = 5.0
_log = logging.getLogger(__name__)


class Owner:
    """Runs on its own thread from :meth:`start` to :meth:`close`.

    Args:
        options: Of the server.
        limit_nbytes: Ceiling of weights, caches and activations.
        prefixes: The prefix cache.
        progress: Of loading.
        on_tick: Called on this thread after every round: the engine takes its snapshot.
        on_fatal: Called once, when the engine cannot go on.
    """

    def __init__(
        self,
        options: ServeOptions,
        limit_nbytes: int,
        prefixes: PrefixCache,
        progress: ProgressSink,
        on_tick: Callable[[], None],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        self.options = options
        self.limit_nbytes = limit_nbytes
        self.prefixes = prefixes
        self.counters = Counters()
        self.models = Residents(options, limit_nbytes, progress, self._closed)
        self.batches: dict[str, Batch] = {}
        self.budget = Budget(limit_nbytes, self.models, self.batches, prefixes)
        self.openings = Openings(self.open)
        self.waiting: FairQueue[Job] = FairQueue()
        self._held: Counter[str] = Counter()
        self._on_tick = on_tick
        self._on_fatal = on_fatal
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._steps = 0
        self._idle_since = time.monotonic()
        self._flushed = 0
        self._thread = threading.Thread(target=self._run, name="optiq-mlx", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def call(self, command: Callable[[], None]) -> None:
        """Run a closure on the owner thread, between steps; any thread."""
        self._commands.put(command)

    def close(self, timeout_s: float) -> None:
        """Cancel what runs, keep prefixes where they survive, end the thread."""
        self.call(lambda: setattr(self, "_closing", True))
        self._thread.join(timeout_s)

    # The rest runs on the owner thread only.

    def open(self, spec: ModelSpec) -> Loaded:
        """The model, loaded now if it is not; others that nobody uses make room.

        It stays until :meth:`let_go` was called as often.

        Raises:
            NoRoom: It does not fit.
            Overloaded: It would fit if running requests of other models were done.
        """
        loaded = self.models.open(spec, self._busy)
        self._held[spec.name] += 1
        return loaded

    def let_go(self, name: str) -> None:
        """What :meth:`open` was called for is done, or waits as a job."""
        self._held[name] -= 1
        self._idle_since = time.monotonic()

    def unload(self, name: str) -> None:
        """Drop a model and what depends on it.

        Raises:
            Overloaded: Requests run on it.
        """
        if name in self._busy():
            raise Overloaded(f"{name} is answering requests; unload it when they are done", retry_after_s=5)
        self.models.close(name)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._round()
            self._end_all(EngineStopped("the server is stopping", retry_after_s=_BUSY_RETRY_S))
            self.prefixes.flush()
        except Exception as error:  # noqa: BLE001  the border of the thread: told, and the process ends
            _log.exception("the engine cannot go on")
            self._end_all(EngineStopped("the engine failed and the server is stopping"))
            self._on_fatal(error)
        finally:
            for batch in self.batches.values():
                batch.close()
            self.batches.clear()
            mx.synchronize()
            mx.clear_streams()  # those of this thread; left open, they abort the process when it exits

    def _round(self) -> None:
        self._take_commands()
        for job in self.waiting.remove(lambda job: job.cancelled):
            job.finish("cancelled")
            self.counters.end("cancelled", job.usage, time.monotonic() - job.created)
        self._admit()
        for name in [name for name, batch in self.batches.items() if batch.rows]:
            self._step(name)
        self.openings.advance()  # what they wait for ended in a step, or in a command
        for loaded in self.models:
            loaded.adapters.sweep()
        if self._is_idle():
            self._rest()
        self._on_tick()

    def _is_idle(self) -> bool:
        return not len(self.waiting) and not any(batch.rows for batch in self.batches.values())

    def _take_commands(self) -> None:
        """Run what was sent so far; wait for something while there is nothing else to do."""
        try:
            self._commands.get(block=self._is_idle(), timeout=_TICK_S)()
        except queue.Empty:
            return
        # What these send is for the next round: rows go on in between.
        for _ in range(self._commands.qsize()):
            self._commands.get_nowait()()

    def _admit(self) -> None:
        """Start what may start, in turn; who waits for memory is not overtaken."""
        starving: list[Job] = []
        while (job := self.waiting.take(lambda each: self._may_start(each, starving))) is not None:
            if (loaded := self.models.get(job.model)) is None:
                job.fail(EngineError(f"{job.model} was unloaded", retry_after_s=1))
            elif not self.budget.make_room(loaded, self._batch(loaded), job):
                job.fail(no_room(loaded, job))
            else:
                self._start(self._batch(loaded), job)

    def _may_start(self, job: Job, starving: list[Job]) -> bool:
        """Whether a job can go now, if only to be refused; else it may be noted as waiting for memory."""
        loaded = self.models.get(job.model)
        if starving or loaded is None:
            return not starving
        batch = self._batch(loaded)
        if len(batch.rows) >= self.options.max_rows or not may_join(batch, job, self.prefixes):
            return False
        if not self.budget.make_room(loaded, batch, job) and self.budget.is_shared:
            starving.append(job)
            return False
        return True

    def _start(self, batch: Batch, job: Job) -> None:
        self.counters.requests += 1
        if job.adapter is not None and job.adapter.name:
            self.counters.adapters[job.adapter.name] += 1
        try:
            batch.start(job)
        except Exception as error:  # noqa: BLE001  this job's error, logged and told
            _log.exception("request %s could not start", job.name)
            job.fail(error)
            self.counters.end(type(error).__name__, job.usage, time.monotonic() - job.created)

    def _step(self, name: str) -> None:
        batch = self.batches[name]
        try:
            batch.step()
        except Exception as error:  # noqa: BLE001  these rows' error; the model must prove that it still runs
            _log.exception("a step of %s failed; its %d requests end", name, len(batch.rows))
            self._restart(name, batch, error)
        self._steps += 1
        if self._steps % _MEMORY_EVERY == 0:
            self.budget.watch()

    def _restart(self, name: str, batch: Batch, error: Exception) -> None:
        """A new batch in place of one that failed.

        Raises:
            Exception: The model does not run on one token either.
        """
        batch.fail(error)
        batch.close()
        del self.batches[name], batch
        mx.clear_cache()
        self.counters.restarts += 1
        loaded = self.models.get(name)
        if loaded is not None:
            loaded.check()

    def _rest(self) -> None:
        """What waits for quiet: prefixes to disk, idle models out of memory."""
        now = time.monotonic()
        if self.counters.requests != self._flushed and self._commands.empty():
            self._idle_since = now
            if self.prefixes.flush(self._commands.empty):
                self._flushed = self.counters.requests
        wait = self.options.idle_unload_s
        if wait is not None and now - self._idle_since > wait and not self._busy():
            for name in self.models.names:
                self.unload(name)

    def _batch(self, loaded: Loaded) -> Batch:
        name = loaded.spec.name
        if name not in self.batches:
            self.batches[name] = Batch(
                loaded, self.prefixes, self.counters, self.options.max_rows, self.options.prefill_step
            )
        return self.batches[name]

    def _busy(self) -> set[str]:
        """Models that requests need."""
        running = {name for name, batch in self.batches.items() if batch.rows}
        return running | {job.model for job in self.waiting} | set(+self._held)

    def _closed(self, loaded: Loaded) -> None:
        """Let go of what depends on a model that is about to go."""
        if (batch := self.batches.pop(loaded.spec.name, None)) is not None:
            batch.close()
        self.prefixes.forget(loaded.cache_key)

    def _end_all(self, error: EngineStopped) -> None:
        for batch in self.batches.values():
            batch.fail(error)
        self.openings.fail(error)
        for job in self.waiting.remove(lambda _: True):
            job.fail(error)
