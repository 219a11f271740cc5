"""The rows of one model that run together: prompt chunks, decode steps, and what each row gets of them.

Sits on mlx-lm's ``BatchGenerator``, the one file that does. Knows jobs and caches, not where jobs come from.
Called on the owner thread only.
"""

import itertools
import logging
import time
from typing import Any, Literal

import numpy as np
from mlx_lm.generate import BatchGenerator

from mlx_optiq_ext.adapters.rows import BASE, AdapterRow, RoutedModel
from mlx_optiq_ext.engine.counters import Counters
from mlx_optiq_ext.engine.decode import AnswerDecoder
from mlx_optiq_ext.engine.guard import RowGuard
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.prefix_cache import PrefixCache, Reuse
from mlx_optiq_ext.engine.sampling import make_processors, make_sampler, token_logprobs
from mlx_optiq_ext.engine.served import Loaded
from mlx_optiq_ext.engine.snapshot import Snapshot, checkpoint_of, shared_length
from mlx_optiq_ext.types.events import Prefilled, Started, ToolCallEnd

__all__ = ["Batch"]

_FIRST_STEP = 256
_LEAST_STEP = 32
_STALL_S = 0.25
"""How long a prompt chunk may hold up rows that decode."""
_ALONE_S = 0.5
"""The same while nobody decodes: how long a cancelled prompt goes on."""
_LIVE_GAIN = 64
_log = logging.getLogger(__name__)


class Batch:
    """Rows of one model.

    Args:
        loaded: The model.
        prefixes: Where finished rows leave their caches.
        counters: What is counted.
        max_rows: Rows that decode together.
        prefill_step: Most prompt tokens per step.
    """

    def __init__(
        self, loaded: Loaded, prefixes: PrefixCache, counters: Counters, max_rows: int, prefill_step: int
    ) -> None:
        self.loaded = loaded
        self._prefixes = prefixes
        self._counters = counters
        self._most = prefill_step
        self._tokens_per_s = 0.0
        self.rows: dict[int, Job] = {}
        self._generator = BatchGenerator(
            RoutedModel(loaded.model),
            completion_batch_size=max_rows,
            prefill_batch_size=min(8, max_rows),
            prefill_step_size=prefill_step,
        )

    def close(self) -> None:
        """Let go of the generator; rows that are left are the caller's to end."""
        self._generator.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' caches."""
        return int(self._generator.prompt_cache_nbytes)

    @property
    def prefilling(self) -> list[Job]:
        """Rows whose prompt is not done."""
        return [job for job in self.rows.values() if job.state == "prefill"]

    def layer_nbytes(self) -> list[int]:
        """Bytes per entry of the model's caches, over all rows."""
        batches = (self._generator._prompt_batch, self._generator._generation_batch)
        caches = [batch.prompt_cache[:-1] for batch in batches if batch.prompt_cache]
        return [sum(cache.nbytes for cache in layer) for layer in zip(*caches, strict=True)]

    def start(self, job: Job) -> None:
        """Give a job a row, going on from the longest prefix at hand."""
        key = self.cache_key(job)
        found = self._prefixes.find(key, job.prompt, lambda more_than: self._live(key, job, more_than))
        length = found.length if found is not None else 0
        caches = found.snapshot.restore(length) if found is not None else self.loaded.fresh_caches()
        if found is not None:
            job.checkpoints = {at: kept for at, kept in found.snapshot.checkpoints.items() if at <= length}
        sampling = self.loaded.sampling(job.request.sampling)
        job.decoder = AnswerDecoder(
            self.loaded.tokenizer,
            job.request,
            starts_reasoning=job.rendered.starts_reasoning,  # type: ignore[union-attr]
        )
        job.guard = RowGuard()
        processors = make_processors(sampling, len(job.prompt), self.loaded.vocab_size)
        sampler = make_sampler(sampling)
        uid = self._generator.insert_segments(
            [_segments(job, length, checkpoints=self.loaded.forgets)],
            max_tokens=[job.max_tokens],
            caches=[[*caches, AdapterRow([job.adapter.slot if job.adapter is not None else BASE])]],
            all_tokens=[list(job.prompt[:length])],
            samplers=[job.guard.sampler(sampler) if sampler is not None else None],
            logits_processors=[[job.guard.processor(each) for each in (*processors, *job.processors)]],
            stop_sequences=[self.loaded.stops],
        )[0]
        self.rows[uid] = job
        job.state, job.cached_tokens, job.prefilled_tokens = "prefill", length, length
        job.emit(Started(cached_tokens=length))

    def step(self) -> None:
        """One decode step of all rows, and one chunk of the prompts.

        Raises:
            Exception: Whatever the model raised; then no row can go on.
        """
        for uid in [uid for uid, job in self.rows.items() if job.cancelled]:
            self._leave(uid, "cancelled")
        if not self.rows:
            return
        self._generator.prefill_step_size = self._chunk()
        began, decoding = time.monotonic(), len(self.rows) - len(self.prefilling)
        prompts, generated = self._generator.next()
        done = 0
        for answer in prompts:
            job = self.rows[answer.uid]
            before = job.prefilled_tokens
            self._prefilled(answer.uid, job, answer)
            done += job.prefilled_tokens - before
        if done:
            self._counters.prefilled.add(done)
            # The rest of a prompt behind a shared prefix is mostly overhead: it says little of long ones.
            if not decoding and done >= min(_FIRST_STEP, self._generator.prefill_step_size):
                self._tokens_per_s = done / max(time.monotonic() - began, 1e-6)
        if generated:
            self._counters.decoded.add(len(generated))
        for answer in generated:
            self._guarded(answer)

    def fail(self, error: Exception) -> None:
        """End every row with an error."""
        jobs = list(self.rows.values())
        self.rows.clear()
        for job in jobs:
            self._end(job, error=error)

    def fail_newest(self, error: Exception) -> None:
        """End the row that came last: the others keep their memory."""
        uid = max(self.rows)
        self._generator.remove([uid])
        self._end(self.rows.pop(uid), error=error)

    def cache_key(self, job: Job) -> str:
        """What a prefix depends on besides its tokens."""
        return f"{self.loaded.cache_key} {job.adapter.digest if job.adapter is not None else ''}"

    def _chunk(self) -> int:
        """Prompt tokens of the next step, by the time they take."""
        is_alone = len(self.prefilling) == len(self.rows)
        if self._tokens_per_s <= 0:
            return min(_FIRST_STEP, self._most)
        wanted = self._tokens_per_s * (_ALONE_S if is_alone else _STALL_S)
        return min(self._most, max(_LEAST_STEP, int(wanted) // _LEAST_STEP * _LEAST_STEP))

    def _live(self, key: str, job: Job, more_than: int) -> Reuse | None:
        """A prefix that a running row computed."""
        wanted = np.asarray(job.prompt[:-1], dtype=np.int32)
        best, most = None, more_than + _LIVE_GAIN
        for uid, row in self.rows.items():
            if row.state != "decode" or self.cache_key(row) != key:
                continue
            shared = shared_length(np.asarray(row.prompt, dtype=np.int32), wanted)
            if shared >= most:
                best, most = uid, shared
        if best is None:
            return None
        snapshot = self._snapshot(best)
        length = snapshot.usable(most)
        return Reuse(snapshot, length) if length > more_than else None

    def _snapshot(self, uid: int) -> Snapshot:
        caches, tokens = self._generator.extract_cache([uid])[uid]
        return Snapshot(tokens, caches[:-1], self.rows[uid].checkpoints)

    def _prefilled(self, uid: int, job: Job, answer: Any) -> None:
        if answer.end_of_prompt:
            job.state = "decode"
            return
        job.prefilled_tokens = job.cached_tokens + answer.progress[0]
        job.emit(Prefilled(done=job.prefilled_tokens, total=len(job.prompt)))
        if answer.end_of_segment and self.loaded.forgets and job.prefilled_tokens < len(job.prompt):
            caches, _ = self._generator.extract_cache([uid])[uid]
            job.checkpoints[job.prefilled_tokens] = checkpoint_of(caches[:-1])

    def _guarded(self, answer: Any) -> None:
        """One row's token; what goes wrong in its own text ends that row alone."""
        job = self.rows[answer.uid]
        try:
            job.guard.check(answer.token, answer.logprobs)
            if job.guard.error is not None:
                raise job.guard.error
            self._token(job, answer)
        except Exception as error:  # noqa: BLE001  one row's error, logged and told, must not end the others
            _log.exception("request %s failed", job.name)
            if answer.finish_reason is None:
                self._generator.remove([answer.uid])
            self._end(self.rows.pop(answer.uid), error=error)

    def _token(self, job: Job, answer: Any) -> None:
        assert job.decoder is not None
        job.completion_tokens += 1
        events = []
        if answer.finish_reason != "stop":
            top = job.request.sampling.logprobs
            logprob = (
                token_logprobs(answer.logprobs, answer.token, top, self.loaded.tokenizer)
                if top is not None
                else None
            )
            events = job.decoder.feed(answer.token, logprob)
        for event in events:
            job.emit(event)
        if job.decoder.stop_sequence is not None:
            self._leave(answer.uid, "stop", answer)
        elif answer.finish_reason is not None:
            self._leave(answer.uid, answer.finish_reason, answer)
        elif not job.request.tool_choice.parallel and any(isinstance(e, ToolCallEnd) for e in events):
            self._leave(answer.uid, "stop", answer)
        if job.first_token is not None and not job.counted:
            job.counted = True
            self._counters.time_to_first_token.add(job.first_token - job.created)

    def _leave(self, uid: int, how: Literal["stop", "length", "cancelled"], answer: Any = None) -> None:
        """Take a row out, keep its caches, tell its job."""
        job = self.rows[uid]
        if answer is not None and answer.finish_reason is not None:
            caches, tokens = answer.prompt_cache, answer.all_tokens
        else:
            caches, tokens = self._generator.remove([uid], return_prompt_caches=True).get(uid, ([], []))
        if tokens and self._prefixes.limit_nbytes > 0:
            self._prefixes.put(self.cache_key(job), Snapshot(tokens, caches[:-1], job.checkpoints))
        del self.rows[uid]
        self._end(job, how=how)

    def _end(
        self,
        job: Job,
        how: Literal["stop", "length", "cancelled"] = "stop",
        error: Exception | None = None,
    ) -> None:
        seconds = time.monotonic() - job.created
        if error is not None:
            job.fail(error)
            self._counters.end(type(error).__name__, job.usage, seconds)
            return
        assert job.decoder is not None
        try:
            events = job.decoder.finish(how)
        except Exception as unread:  # noqa: BLE001  the row is out: its own error, and nobody else's
            _log.exception("the end of request %s could not be read", job.name)
            self._end(job, error=unread)
            return
        for event in events:
            job.emit(event)
        stop = job.decoder.stop_sequence
        reason: Any = how
        if how == "stop" and stop is not None:
            reason = "stop_sequence"
        elif how == "stop" and job.decoder.num_calls:
            reason = "tool_calls"
        job.finish(reason, stop)
        self._counters.end(reason, job.usage, seconds)


def _segments(job: Job, length: int, *, checkpoints: bool) -> list[list[int]]:
    """What is left of a prompt, cut where a checkpoint is wanted."""
    assert job.rendered is not None
    marks = [at for at in job.rendered.boundaries if length < at < len(job.prompt)] if checkpoints else []
    edges = [length, *marks, len(job.prompt)]
    return [list(job.prompt[a:b]) for a, b in itertools.pairwise(edges)]
