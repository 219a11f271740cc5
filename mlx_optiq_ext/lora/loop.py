"""The training loop: updates, validation, checkpoints, and a clean end whatever happens.

Everything that an update depends on is a function of its number, the seed and the checkpoint, so a training
that was stopped goes on to the same bits. Knows no loss (``objective``) and no file but its checkpoint.
Called by ``train``; evaluates after every update.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_map, tree_unflatten
from msgspec.structs import replace

from mlx_optiq_ext.lora.batches import Order
from mlx_optiq_ext.lora.checkpoint import Arrays, Interval, Store, TrainState
from mlx_optiq_ext.lora.objective import NotFinite, Objective, Sums
from mlx_optiq_ext.lora.recompute import recomputed
from mlx_optiq_ext.lora.schedule import build_optimizer
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.intercept import constant_indices
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.training import TrainOptions, TrainRecord, ValidationRecord

__all__ = ["Trainer"]

_T = TypeVar("_T")


class Trainer(Generic[_T]):
    """One training of the trainable parameters of a model.

    Args:
        model: With its adapter; everything else is frozen.
        objective: The loss.
        data: Items to learn from, and items to judge by; without the latter the last adapter is kept.
        options: How it is trained.
        store: Where checkpoints and metrics go.
        progress: Told about every update.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[_T],
        data: tuple[Sequence[_T], Sequence[_T]],
        options: TrainOptions,
        store: Store,
        progress: ProgressSink = ignore_progress,
    ) -> None:
        self._model = model
        self._objective = objective
        self._train, self._valid = data
        self._options = options
        self._store = store
        self._progress = progress
        lengths = [objective.length(item) for item in self._train]
        self._order = Order(lengths, options.batch_size * options.accumulate, options.seed)
        self.num_updates = self._order.num_updates(options)
        """Updates until the end."""
        self._optimizer = build_optimizer(options, self.num_updates)
        self._gradient = nn.value_and_grad(model, objective.sums)
        self.state = TrainState()
        """After the last update."""
        self.kept_arrays: Arrays = {}
        """Goes into every checkpoint besides the trainer's own."""
        self._arrays: Arrays = {}
        self._resumed_at: int | None = None
        self._shown: dict[str, str] = {}
        self._values: dict[str, float] = {}

    @property
    def padded_share(self) -> float:
        """Part of all positions that is padding."""
        return self._order.padded_share(self._options.batch_size)

    @property
    def kept_step(self) -> int:
        """Update whose adapter is kept."""
        return self.state.step if self.state.best_step is None else self.state.best_step

    @property
    def stopped_early(self) -> bool:
        """Whether the validation loss has not fallen for as long as it may."""
        return 0 < self._options.patience <= self.state.misses

    def restore(self, state: TrainState, arrays: Arrays) -> None:
        """Go on from a checkpoint."""
        self.state, self._arrays = state, arrays
        self._resumed_at = state.step
        self._model.update(tree_unflatten(list(arrays["adapter"].items())))
        self._optimizer.state = tree_unflatten(list(arrays.get("optimizer", {}).items()))

    def run(self) -> None:
        """Train to the end, or to an early stop; then the model holds the adapter that is kept.

        Raises:
            NotFinite: Says at which update and example; the model holds the last good adapter that is kept.
            KeyboardInterrupt: Went through; a checkpoint of the last whole update is saved, and says so.
        """
        with ExitStack() as stack:
            # Experts are chosen by indices, which have no gradient.
            stack.enter_context(constant_indices())
            if self._options.grad_checkpoint:
                stack.enter_context(recomputed(find_blocks(self._model).modules))
            self._store.start_metrics(self._resumed_at)
            try:
                if self._valid and self.state.best_loss is None:
                    self.state = self._validate(self.state)
                    self._take()
                    self._draw(self.state)
                while self.state.step < self.num_updates and not self.stopped_early:
                    self.state = self._next(self.state)
                    self._take()
                    if self.state.step % self._options.save_every == 0:
                        self._save()
            except KeyboardInterrupt as stop:
                self._stop(stop)
                raise
            finally:
                self._keep_best()

    def sums(self, items: Sequence[_T]) -> Sums:
        """Loss over items as they are, without dropout; evaluates."""
        total = Sums()
        self._model.eval()
        order = sorted(range(len(items)), key=lambda index: self._objective.length(items[index]))
        for at in range(0, len(order), self._options.batch_size):
            members = [items[index] for index in order[at : at + self._options.batch_size]]
            batch = self._objective.collate(members)
            loss, values = self._objective.sums(batch)
            total = total.plus(self._checked(members, batch, loss, values))
        return total

    def _next(self, state: TrainState) -> TrainState:
        """One update, and what is due after it."""
        started = time.perf_counter()
        sums, norm = self._update(state.step)
        seconds = time.perf_counter() - started
        since = state.interval
        interval = Interval(
            loss=since.loss + sums.loss,
            weight=since.weight + sums.weight,
            num_tokens=since.num_tokens + sums.num_tokens,
            seconds=since.seconds + seconds,
            values=Sums(values=since.values).plus(sums).values,
        )
        state = replace(
            state,
            step=state.step + 1,
            num_tokens=state.num_tokens + sums.num_tokens,
            seconds=state.seconds + seconds,
            interval=interval,
        )
        self._values |= {
            "loss": sums.loss / sums.weight,
            "learning_rate": _number(self._optimizer.learning_rate),
            "gradient_norm": norm,
            "tokens_per_s": sums.num_tokens / seconds,
            "peak_memory_nbytes": mx.get_peak_memory(),
            **{name: value / sums.weight for name, value in sums.values.items()},
        }
        is_last = state.step == self.num_updates
        if is_last or state.step % self._options.report_every == 0:
            state = self._report(state, norm)
        if self._valid and (is_last or state.step % self._options.validate_every == 0):
            state = self._validate(state)
        self._draw(state)
        return state

    def _update(self, number: int) -> tuple[Sums, float]:
        """Gradients of all parts of an update together, then one step of the optimizer."""
        members = [self._train[index] for index in self._order.update(number)]
        total, gradients = Sums(), None
        self._model.train()
        for at in range(0, len(members), self._options.batch_size):
            part = members[at : at + self._options.batch_size]
            mx.random.seed(_part_seed(self._options.seed, number, at))
            batch = self._objective.collate(part)
            (loss, values), gradient = self._gradient(batch)
            gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
            mx.eval(loss, values, gradients)
            total = total.plus(self._checked(part, batch, loss, values, f"update {number + 1}"))
        gradients = tree_map(lambda gradient: gradient / total.weight, gradients)
        clipped, length = clip_grad_norm(gradients, self._options.clip or math.inf)
        norm = _number(length)
        if not math.isfinite(norm):
            places = ", ".join(self._objective.where(item) for item in members)
            raise NotFinite(f"the gradient of update {number + 1} is not finite; its examples: {places}")
        self._optimizer.update(self._model, clipped if self._options.clip else gradients)
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)
        mx.clear_cache()
        return total, norm

    def _checked(
        self, members: Sequence[_T], batch: Any, loss: mx.array, values: dict[str, mx.array], when: str = ""
    ) -> Sums:
        """Sums of a batch; names the example whose loss is no number."""
        found = _number(loss)
        if not math.isfinite(found):
            alone = [self._objective.sums(self._objective.collate([item]))[0] for item in members]
            where = [self._objective.where(item) for item in members]
            culprits = [
                place for place, own in zip(where, alone, strict=True) if not math.isfinite(_number(own))
            ]
            places = ", ".join(culprits or where)
            raise NotFinite(f"the loss at {when or 'validation'} is {found}: {places}")
        sums = {name: _number(value) for name, value in values.items()}
        return Sums(loss=found, weight=batch.weight, num_tokens=batch.num_tokens, values=sums)

    def _report(self, state: TrainState, norm: float) -> TrainState:
        since = state.interval
        record = TrainRecord(
            step=state.step,
            loss=since.loss / since.weight,
            learning_rate=_number(self._optimizer.learning_rate),
            gradient_norm=norm,
            num_tokens=state.num_tokens,
            tokens_per_s=since.num_tokens / since.seconds,
            peak_memory_nbytes=mx.get_peak_memory(),
            values={name: value / since.weight for name, value in since.values.items()},
        )
        self._store.add_metric(record)
        self._shown["loss"] = f"loss {record.loss:.4f}"
        self._shown["rate"] = f"{record.tokens_per_s:,.0f} tokens/s, {record.peak_memory_nbytes / 1e9:.2f} GB"
        return replace(state, interval=Interval())

    def _validate(self, state: TrainState) -> TrainState:
        sums = self.sums(self._valid)
        loss = sums.loss / sums.weight
        is_best = state.best_loss is None or loss < state.best_loss
        values = {name: value / sums.weight for name, value in sums.values.items()}
        record = ValidationRecord(step=state.step, loss=loss, is_best=is_best, values=values)
        self._store.add_metric(record)
        self._shown["validation"] = f"validation {loss:.4f}"
        self._values |= {"validation_loss": loss, "validation_step": state.step}
        self._values |= {f"validation_{name}": value for name, value in values.items()}
        if not is_best:
            return replace(state, misses=state.misses + 1)
        self._arrays = {**self._arrays, "best": self._adapter()}
        return replace(state, best_step=state.step, best_loss=loss, misses=0)

    def _draw(self, state: TrainState) -> None:
        shown = [self._shown[name] for name in ("loss", "validation", "rate") if name in self._shown]
        event = Progress(
            stage="train",
            done=state.step,
            total=self.num_updates,
            detail=", ".join(shown),
            replayed=self._resumed_at or 0,
            values=dict(self._values),
        )
        self._progress(event)

    def _adapter(self) -> dict[str, mx.array]:
        return dict(named_arrays(self._model.trainable_parameters()))

    def _take(self) -> None:
        """Note the arrays of :attr:`state`: an interrupt may come in the middle of the next update."""
        optimizer = dict(named_arrays(self._optimizer.state))
        self._arrays = {**self._arrays, "adapter": self._adapter(), "optimizer": optimizer}

    def _save(self) -> None:
        self._store.save(self.state, {**self._arrays, **self.kept_arrays})

    def _stop(self, stop: KeyboardInterrupt) -> None:
        if "adapter" not in self._arrays:
            return
        self._save()
        stop.add_note(
            f"a checkpoint of update {self.state.step} is in {self._store.file}; run the same command again "
            "to go on from there"
        )

    def _keep_best(self) -> None:
        kept = self._arrays.get("best") or self._arrays.get("adapter")
        if kept:
            self._model.update(tree_unflatten(list(kept.items())))


def _part_seed(seed: int, number: int, part: int) -> int:
    """Seed of the dropout of one part of an update."""
    return int(np.random.SeedSequence((seed, number, part)).generate_state(1, np.uint64)[0])


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar.astype(mx.float32)).item())
