"""The engine as callers see it: any thread sends requests, two threads of its own do the work.

The prompt thread renders and tokenizes; the owner thread runs the models. Implements
:class:`mlx_optiq_ext.types.port.Engine`; made by ``optiq serve``, and by tests.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from msgspec.structs import replace

from mlx_optiq_ext.allocate.size import parse_nbytes
from mlx_optiq_ext.engine.adapter_desk import AdapterDesk, parse_adapters
from mlx_optiq_ext.engine.embeddings import embed_inputs
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.log_ring import LogRing
from mlx_optiq_ext.engine.memory import default_limit_nbytes
from mlx_optiq_ext.engine.names import ModelNames
from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.prefixes import build_prefix_cache
from mlx_optiq_ext.engine.prompt_thread import PromptThread
from mlx_optiq_ext.engine.report import engine_status
from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.engine.settle import refuse, settle
from mlx_optiq_ext.errors import EngineStopped, PromptTooLong, QueueFull, UnknownName
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Accepted, Event, EventSink, Failed, Finished
from mlx_optiq_ext.types.port import Embeddings, LogLine
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus

__all__ = ["LocalEngine"]

T = TypeVar("T")
_RETRY_S = 2.0
_SNAPSHOT_S = 0.2


class LocalEngine:
    """Models on this machine.

    Args:
        specs: The models that can be served, the default one first.
        options: Of the server.
        progress: Of loading.
        on_fatal: Called when the engine cannot go on; the process should end.
    Raises:
        UsageError: A size, an alias or the cache folder is not usable.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        options: ServeOptions,
        *,
        progress: ProgressSink = ignore_progress,
        on_fatal: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._options = options
        self._names = ModelNames(self._specs, options.alias, strict=options.strict_names)
        self._on_fatal = on_fatal
        limit = parse_nbytes(options.memory, flag="--memory") if options.memory else default_limit_nbytes()
        prefixes = build_prefix_cache(options, limit)
        self._owner = Owner(
            options,
            limit,
            prefixes,
            progress,
            on_tick=self._tick,
            on_fatal=self._fail,
        )
        given = parse_adapters(options.adapter, self._specs)
        self._desk = AdapterDesk(self._owner, options.adapters_dir, given, self._take_snapshot)
        self._prompts = PromptThread(self._owner, self._desk.restore)
        self._jobs: dict[str, Job] = {}
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._draining = self._failed = self._started = False
        self._taken = 0.0
        self._log = LogRing()
        self._status = engine_status("loading", self._owner, self._specs, (), self._names)

    def start(self) -> None:
        """Load the default model and begin to answer; blocks until it is loaded.

        Raises:
            OptiqError: It cannot be loaded.
        """
        logging.getLogger("mlx_optiq_ext").addHandler(self._log)
        self._owner.start()
        self._prompts.start()
        try:
            self.load(next(iter(self._specs))).result()
        except BaseException:
            self.close()
            raise
        self._started = True

    def submit(self, request: Generation, deliver: EventSink) -> str:
        """See :meth:`.Engine.submit`."""
        with self._guard:
            model = self._require_ready(request)
            waiting = sum(job.state == "queued" for job in self._jobs.values())
            free = max(0, self._options.max_rows - (len(self._jobs) - waiting))
            if waiting >= self._options.max_queue + free:
                message = f"{waiting} requests wait already; ask again later, or raise --max-queue"
                raise QueueFull(message, retry_after_s=_RETRY_S)
            name = f"job{next(self._numbers)}"
            job = Job(name, request, self._forgetting(name, deliver), model)
            self._jobs[name] = job

        def take_adapter(loaded: Loaded) -> None:
            adapter = job.adapter = loaded.adapters.take(request.adapter)
            job.release = lambda: loaded.adapters.let_go(adapter)

        self._prompts.run(
            self._specs[model],
            lambda loaded: self._prepare(job, loaded),
            job.fail,
            first=take_adapter,
            has_left=job.has_left,
        )
        return name

    def cancel(self, job: str) -> None:
        """See :meth:`.Engine.cancel`."""
        with self._guard:
            known = self._jobs.get(job)
        if known is not None:
            known.cancelled = True
            self._owner.call(lambda: None)  # wakes an owner that waits for a command

    def count_tokens(self, request: Generation) -> "Future[int]":
        """See :meth:`.Engine.count_tokens`."""
        future: Future[int] = Future()
        model = self._require_ready(request)
        self._prompts.run(
            self._specs[model],
            lambda loaded: settle(future, lambda: len(loaded.render(request).tokens)),
            partial(refuse, future),
        )
        return future

    def embed(self, model: str, inputs: tuple[str | tuple[int, ...], ...]) -> "Future[Embeddings]":
        """See :meth:`.Engine.embed`."""
        future: Future[Embeddings] = Future()
        spec = self._specs[self._require_ready(Generation(model=model))]
        self._prompts.run(
            spec,
            lambda loaded: embed_inputs(self._owner, loaded, inputs, future),
            partial(refuse, future),
        )
        return future

    def status(self) -> EngineStatus:
        """See :meth:`.Engine.status`."""
        return replace(
            self._status, state=self._state(), uptime_s=time.monotonic() - self._owner.counters.started
        )

    def load(self, model: str) -> "Future[None]":
        """See :meth:`.Engine.load`."""
        spec = self._spec(model)

        def opened() -> None:
            loaded = self._owner.open(spec)
            try:
                self._desk.restore(loaded)
            finally:
                self._owner.let_go(spec.name)

        return self._on_owner(opened)

    def unload(self, model: str) -> "Future[None]":
        """See :meth:`.Engine.unload`."""
        spec = self._spec(model)
        return self._on_owner(lambda: self._owner.unload(spec.name))

    def mount(self, name: str, source: str, model: str = "") -> "Future[AdapterStatus]":
        """See :meth:`.Engine.mount`."""
        return self._desk.mount(name, source, self._specs[self._names.resolve(model)])

    def unmount(self, name: str, model: str = "") -> "Future[None]":
        """See :meth:`.Engine.unmount`."""
        return self._desk.unmount(name, self._specs[self._names.resolve(model)])

    def use(self, name: str | None, model: str = "") -> "Future[None]":
        """See :meth:`.Engine.use`."""
        return self._desk.use(name, self._specs[self._names.resolve(model)])

    def clear_prefix_cache(self) -> "Future[int]":
        """See :meth:`.Engine.clear_prefix_cache`."""
        return self._on_owner(self._owner.prefixes.clear)

    def log_lines(self, after: int = 0) -> tuple[LogLine, ...]:
        """See :meth:`.Engine.log_lines`."""
        return self._log.lines(after)

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; whether all of them ended."""
        self._draining = True
        until = time.monotonic() + timeout_s
        while self._jobs and time.monotonic() < until:
            time.sleep(0.02)
        return not self._jobs

    def close(self, timeout_s: float = 60.0) -> None:
        """End what runs, keep prefixes where they survive, stop both threads."""
        self._draining = True
        self._prompts.stop()
        self._owner.close(timeout_s)
        self._fail_all(EngineStopped("the server is stopping", retry_after_s=_RETRY_S))
        logging.getLogger("mlx_optiq_ext").removeHandler(self._log)

    def _require_ready(self, request: Generation) -> str:
        """The model that answers; :class:`EngineStopped` or :class:`UnknownName` where none does."""
        if self._failed or self._draining:
            raise EngineStopped("the server is stopping", retry_after_s=_RETRY_S)
        return self._names.resolve(request.model)

    def _spec(self, model: str) -> ModelSpec:
        if model not in self._specs:
            raise UnknownName(f"no model {model!r}; there are {', '.join(self._specs)}", param="model")
        return self._specs[model]

    def _prepare(self, job: Job, loaded: Loaded) -> None:
        """Render, check and accept a job; on the prompt thread."""
        if job.has_left():
            return
        request, rendered = job.request, loaded.render(job.request)
        left = loaded.context - len(rendered.tokens)
        if left <= 0:
            raise PromptTooLong(len(rendered.tokens), loaded.context)
        processor = loaded.constrainer.processor(request, rendered)
        job.rendered = rendered
        job.processors = [processor] if processor is not None else []
        job.max_tokens = min(request.max_tokens or self._options.max_tokens or left, left)
        job.emit(Accepted(prompt_tokens=len(rendered.tokens), model=job.model))
        self._owner.call(lambda: self._owner.waiting.push(request.session or job.name, job))

    def _forgetting(self, name: str, deliver: EventSink) -> EventSink:
        def delivered(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                with self._guard:
                    job = self._jobs.pop(name, None)
                if job is not None:
                    job.release()
            deliver(event)

        return delivered

    def _on_owner(self, action: Callable[[], T]) -> "Future[T]":
        if self._failed:
            raise EngineStopped("the engine failed")
        future: Future[T] = Future()

        def act() -> T:
            done = action()
            self._take_snapshot()
            return done

        self._owner.call(lambda: settle(future, act))
        return future

    def _tick(self) -> None:
        if time.monotonic() - self._taken >= _SNAPSHOT_S or not self._jobs:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        self._taken = time.monotonic()
        with self._guard:
            jobs = tuple(self._jobs.values())
        self._status = engine_status(self._state(), self._owner, self._specs, jobs, self._names)

    def _state(self) -> str:
        if self._failed:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self._started else "loading"

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._fail_all(EngineStopped("the engine failed and the server is stopping"))
        self._on_fatal(error)

    def _fail_all(self, error: EngineStopped) -> None:
        """Tell every job that is left, wherever it waits."""
        with self._guard:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.fail(error)
