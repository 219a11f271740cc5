"""How far each update goes: AdamW under a cosine with warm-up."""

import math
from collections.abc import Callable

import mlx.core as mx
from mlx.optimizers import AdamW

from mlx_optiq_ext.types.training import TrainOptions

__all__ = ["build_optimizer", "cosine_rate"]


def build_optimizer(options: TrainOptions, num_updates: int) -> AdamW:
    """AdamW with corrected moments, whose learning rate follows :func:`cosine_rate`."""
    rate = cosine_rate(
        options.learning_rate,
        num_updates,
        warmup=round(options.warmup * num_updates),
        final_share=options.final_rate,
    )
    return AdamW(learning_rate=rate, weight_decay=options.weight_decay, bias_correction=True)


def cosine_rate(
    highest: float, num_updates: int, *, warmup: int, final_share: float
) -> Callable[[mx.array], mx.array]:
    """Learning rate of an update, counted from 0.

    Rises evenly to ``highest`` over the first ``warmup`` updates, the first of which is not lost to a rate of
    zero, and falls along half a cosine to ``final_share`` of it at the last update.
    """
    falling = max(num_updates - 1 - warmup, 1)

    def rate(update: mx.array) -> mx.array:
        rise = mx.minimum((update + 1) / (warmup + 1), 1.0)
        through = mx.clip((update - warmup) / falling, 0.0, 1.0)
        fall = final_share + (1 - final_share) * 0.5 * (1 + mx.cos(math.pi * through))
        return highest * rise * fall

    return rate
