"""A whole training, from names to files: data, ranks, loss, loop, adapter.

Knows the order of the steps; each step is a module of its own. Called by ``optiq lora train``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from msgspec.structs import replace

from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.checkpoint import Arrays, read_metrics
from mlx_optiq_ext.lora.dpo import Judged, Preferring, judge_pairs
from mlx_optiq_ext.lora.files import describe_adapter, save_adapter
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.loop import Trainer
from mlx_optiq_ext.lora.loss_curve import loss_scene
from mlx_optiq_ext.lora.objective import NotFinite
from mlx_optiq_ext.lora.prepare import NOT_IN_SETTINGS, TrainJob, prepare_training
from mlx_optiq_ext.lora.sft import Imitation
from mlx_optiq_ext.lora.tokens import TokenData
from mlx_optiq_ext.quant.exact import make_exact
from mlx_optiq_ext.quant.report_html import svg_document
from mlx_optiq_ext.types.adapter import AdapterConfig, RankMap, TrainingFacts
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.training import (
    CURVE_FILE,
    METRICS_FILE,
    TrainOptions,
    TrainRecord,
    TrainSummary,
    ValidationRecord,
)

__all__ = ["train_adapter"]


def train_adapter(
    job: TrainJob,
    *,
    on_ranks: Callable[[RankMap], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    progress: ProgressSink = ignore_progress,
) -> TrainSummary:
    """Train an adapter and write it, its metrics and its loss curve into ``job.out``.

    A training of the same settings that was stopped there goes on from its checkpoint to the same result, in
    float32 on a CPU bit for bit.

    Args:
        job: Model, data, output and options.
        on_ranks: Shown the rank map before the first update.
        on_note: Told what was cut, split off or resumed.
        progress: Told about every stage.
    Raises:
        OutputExists: The output holds something else than a stopped training.
        UsageError: Unusable data, options that exclude each other, or a checkpoint of other settings.
        NotFinite: A loss or gradient is no number; the last good adapter is written.
        KeyboardInterrupt: Went through, after a checkpoint was saved.
    """
    ready = prepare_training(job, on_ranks=on_ranks, on_note=on_note, progress=progress)
    data, model, store, ranks = ready.data, ready.model, ready.store, ready.plan.ranks
    make_exact(model, job.base.source, remedy="train it on a larger machine")
    ready.plan.apply(model, dropout=job.options.dropout, seed=job.options.seed, progress=progress)
    if not job.options.resume:
        store.discard()
    found = store.load()
    parts, reference = _judged(job, model, data, found[1] if found else {}, progress)
    trainer: Trainer[Any] = Trainer(
        model, _objective(job.options, model), (parts.train, parts.valid), job.options, store, progress
    )
    trainer.kept_arrays = reference
    if job.options.method == "sft":  # of pairs only the longer answers' lengths are compared
        on_note(f"{trainer.padded_share:.1%} of all positions are padding")
    if found is not None:
        trainer.restore(*found)
        on_note(f"going on after update {found[0].step}, from {store.file}")

    def finish(test: Sequence[Any]) -> TrainSummary:
        summary = _summary(job, trainer, test)
        save_adapter(job.out, model, _config(job, ranks, summary, data))
        _draw(job)
        store.discard()
        return summary

    try:
        trainer.run()
    except NotFinite as error:
        hint = "lower --learning-rate or mend the data"
        if trainer.state.step == 0:
            raise NotFinite(f"{error}; {hint}") from error
        kept = finish([]).kept_step
        raise NotFinite(f"{error}; {hint}. The adapter of update {kept} is in {job.out}") from error
    return finish(parts.test)


def _judged(
    job: TrainJob, model: nn.Module, data: TokenData, kept: Arrays, progress: ProgressSink
) -> tuple[TokenData, Arrays]:
    """For DPO every pair with what the base says of it, from the checkpoint where it was computed before."""
    if job.options.method == "sft":
        return data, {}
    pairs = [*data.train, *data.valid, *data.test]
    if "reference" in kept:
        reference = np.array(kept["reference"]["logprobs"])
    else:
        reference = judge_pairs(model, LogProbs(model), pairs, job.options.batch_size, progress)
    judged = [
        Judged(pair=pair, reference=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(pairs, reference, strict=True)
    ]
    first, second = len(data.train), len(data.train) + len(data.valid)
    parts = replace(data, train=judged[:first], valid=judged[first:second], test=judged[second:])
    return parts, {"reference": {"logprobs": mx.array(reference)}}


def _objective(options: TrainOptions, model: nn.Module) -> Any:
    logprobs = LogProbs(model)
    if options.method == "sft":
        return Imitation(logprobs)
    return Preferring(
        logprobs, kind=options.dpo_loss, beta=options.beta, label_smoothing=options.label_smoothing
    )


def _summary(job: TrainJob, trainer: Trainer[Any], test: Sequence[Any]) -> TrainSummary:
    metrics = read_metrics(job.out / METRICS_FILE)
    train = [metric for metric in metrics if isinstance(metric, TrainRecord)]
    valid = [metric for metric in metrics if isinstance(metric, ValidationRecord)]
    tested = trainer.sums(test) if test else None
    return TrainSummary(
        steps=trainer.state.step,
        kept_step=trainer.kept_step,
        stopped_early=trainer.stopped_early,
        train_loss=train[-1].loss if train else None,
        first_validation=valid[0] if valid else None,
        validation=next((record for record in reversed(valid) if record.is_best), None),
        test_loss=tested.loss / tested.weight if tested else None,
        num_tokens=trainer.state.num_tokens,
        seconds=trainer.state.seconds,
        peak_memory_nbytes=mx.get_peak_memory(),
    )


def _config(job: TrainJob, ranks: RankMap, summary: TrainSummary, data: TokenData) -> AdapterConfig:
    settings = msgspec.to_builtins(job.options)
    facts = TrainingFacts(
        method=job.options.method,
        data=Path(job.data).name if Path(job.data).exists() else job.data,
        steps=summary.kept_step,
        num_tokens=summary.num_tokens,
        train_loss=summary.train_loss,
        validation_loss=summary.validation.loss if summary.validation else None,
        settings={name: value for name, value in settings.items() if name not in NOT_IN_SETTINGS},
        notes=data.notes,
    )
    return describe_adapter(
        ranks, job.adapter, base=fingerprint(job.base), dropout=job.options.dropout, training=facts
    )


def _draw(job: TrainJob) -> None:
    unit = "nats per learnt token" if job.options.method == "sft" else "nats per pair"
    scene = loss_scene(read_metrics(job.out / METRICS_FILE), f"Training of {job.out.name}", unit)
    if scene is not None:
        write_bytes_atomic(job.out / CURVE_FILE, svg_document(scene).encode())
