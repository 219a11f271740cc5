"""What a training would do, without doing it. Called by ``optiq lora train --dry-run``."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from mlx_optiq_ext.lora.batches import Order
from mlx_optiq_ext.lora.masks import Pair, Sample
from mlx_optiq_ext.lora.prepare import TrainJob, prepare_training
from mlx_optiq_ext.models.load import load_tokenizer
from mlx_optiq_ext.types.adapter import RankMap
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.training import PartSize, RenderedSample, TextPiece, TrainPreview

__all__ = ["preview_training"]

_SHOWN = 3


def preview_training(
    job: TrainJob,
    *,
    on_ranks: Callable[[RankMap], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    progress: ProgressSink = ignore_progress,
) -> TrainPreview:
    """Check everything that a training checks before its first update, and count; writes nothing.

    Args:
        job: Model, data, output and options.
        on_ranks: Shown the rank map.
        on_note: Told what would be cut, split off or resumed.
        progress: Told about every stage.
    Raises:
        OutputExists: The output holds something else than a stopped training.
        UsageError: Unusable data, options that exclude each other, or a checkpoint of other settings.
    """
    ready = prepare_training(job, on_ranks=on_ranks, on_note=on_note, progress=progress)
    data, options = ready.data, job.options
    found = ready.store.load() if options.resume else None
    if found is not None:
        on_note(f"would go on after update {found[0].step}, from {ready.store.file}")
    lengths = [max(len(sample.tokens) for sample in _samples([item])) for item in data.train]
    tokenizer = load_tokenizer(job.base, trust_remote_code=job.trust_remote_code)
    order = Order(lengths, options.batch_size * options.accumulate, options.seed)
    return TrainPreview(
        train=_size(data.train),
        valid=_size(data.valid),
        test=_size(data.test),
        updates_per_epoch=order.updates_per_epoch,
        updates=order.num_updates(options),
        done_updates=found[0].step if found is not None else 0,
        num_parameters=ready.plan.ranks.num_parameters,
        samples=tuple(_rendered(tokenizer, sample) for sample in _samples(data.train[:_SHOWN])),
    )


def _size(items: Sequence[Any]) -> PartSize:
    samples = _samples(items)
    return PartSize(
        examples=len(items),
        tokens=sum(len(sample.tokens) for sample in samples),
        learnt_tokens=sum(sample.num_learnt for sample in samples),
        longest=max((len(sample.tokens) for sample in samples), default=0),
    )


def _rendered(tokenizer: Any, sample: Sample) -> RenderedSample:
    """A sample as text, cut where learning begins and ends."""
    ends = [0, *(place for span in sample.spans for place in span), len(sample.tokens)]
    learnt = {begin for begin, _ in sample.spans}
    return RenderedSample(
        where=sample.where,
        pieces=tuple(
            TextPiece(text=tokenizer.decode(list(sample.tokens[begin:end])), is_learnt=begin in learnt)
            for begin, end in pairwise(ends)
            if end > begin
        ),
    )


def _samples(items: Sequence[Sample | Pair]) -> list[Sample]:
    """All answers, of pairs both."""
    return [
        sample
        for item in items
        for sample in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
    ]
