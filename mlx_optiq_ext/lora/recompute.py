"""Gradient checkpointing: blocks computed again in the backward pass in place of keeping what is inside them.

mlx-lm's ``grad_checkpoint`` changes a class for the rest of the process, and under dropout the second forward
pass draws other units than the first, which makes its gradients wrong (mlx-lm 0.32); this one steps back when
it is done and draws the same.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_optiq_ext.models.intercept import intercepted

__all__ = ["recomputed"]


def recomputed(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Compute the blocks again in the backward pass, as long as the context lasts.

    Args:
        blocks: Modules whose inside is not kept; their trainable parameters get their gradients.
    Cost: one more forward pass; memory of one block and every block's input.
    """
    return intercepted(blocks, _checkpointed)


def _checkpointed(
    block: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Evaluated here, outside of what is computed twice, so that both times the same units are dropped.
    seed = np.array(mx.random.randint(0, 1 << 31, dtype=mx.uint32)).item()

    def inside(trained: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        block.update(trained)
        mx.random.seed(seed)
        return original(*args, **kwargs)

    return mx.checkpoint(inside)(block.trainable_parameters(), *args, **kwargs)
