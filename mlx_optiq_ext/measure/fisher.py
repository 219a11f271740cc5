"""One pass that yields the second-order statistics of every tensor, block by block.

Labels are sampled from the model's own distribution (the true Fisher; the gradient of the divergence itself
vanishes at the reference). Called by ``quant.sensitivity``, which puts weight errors into the statistics.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_optiq_ext.errors import MeasurementError
from mlx_optiq_ext.measure.statistics import UnitStatistics, statistics_of
from mlx_optiq_ext.models.reverse import Reverse
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.taps import Capture
from mlx_optiq_ext.models.walk import get_module

__all__ = ["BlockStatistics", "fisher_pass", "sampled_label_gradient"]


class BlockStatistics(NamedTuple):
    """Statistics of the tensors of one block (None: outside of blocks), by path."""

    block: int | None
    units: dict[str, UnitStatistics]


def sampled_label_gradient(logits: mx.array, key: mx.array) -> mx.array:
    """Gradient of Σ_t −log p(y_t) with y ~ p drawn from the logits themselves: softmax − one-hot.

    Args:
        logits: (1, T, V), any float type.
        key: Random key.
    Returns:
        Same shape and type as ``logits``; lazy.
    """
    scores = logits.astype(mx.float32)
    labels = mx.random.categorical(scores, key=key)
    probabilities = mx.softmax(scores, axis=-1, precise=True)
    taken = mx.take_along_axis(probabilities, labels[..., None], axis=-1)
    return mx.put_along_axis(probabilities, labels[..., None], taken - 1.0, axis=-1).astype(logits.dtype)


def fisher_pass(tape: Tape, *, samples: int, seed: int) -> Iterator[BlockStatistics]:
    """Differentiate the recorded forward pass and yield statistics from the last block to the first.

    A block that runs several times in one forward pass is yielded once, with all its calls. Modules
    outside of blocks come last; the head's output side is not among them (``measure.head``).

    Args:
        tape: After :meth:`Tape.forward`.
        samples: Sampled labels per position.
        seed: Seed of the labels.
    Raises:
        MeasurementError: Gradients are not finite.
    Cost: per sample one recomputation and one backward pass over the calibration text.
    """
    num_windows = tape.num_windows
    num_tokens = int(tape.tokens.size) * samples

    def cotangent(item: int, logits: mx.array) -> mx.array:
        return sampled_label_gradient(logits, mx.random.key(seed * 1_000_003 + item))

    calls_left: dict[int | None, int] = {None: 1}
    for node in tape.nodes:
        calls_left[node.block] = calls_left.get(node.block, 0) + 1
    held: dict[int | None, dict[str, list[tuple[int, Capture]]]] = {}
    for captured in Reverse(tape, cotangent, samples).run():
        by_path = held.setdefault(captured.block, {})
        for item, captures in enumerate(captured.items):
            for capture in captures:
                by_path.setdefault(capture.call.path, []).append((item % num_windows, capture))
        captured.items.clear()  # the statistics below keep squares of gradients; the gradients can go
        calls_left[captured.block] -= 1
        if calls_left[captured.block]:
            continue
        units = {}
        by_path = held.pop(captured.block)
        for path in list(by_path):
            found = by_path.pop(path)
            _require_finite(path, found)
            weight_shape = get_module(tape.model, path).weight.shape
            units[path] = statistics_of(found, weight_shape, num_tokens, num_windows)
            del found
        yield BlockStatistics(captured.block, units)


def _require_finite(path: str, captures: list[tuple[int, Capture]]) -> None:
    finite = mx.stack([mx.all(mx.isfinite(capture.g)) for _, capture in captures])
    if not bool(mx.all(finite)):
        raise MeasurementError(
            f"{path}: gradients are not finite; measure in float32 (half precision may overflow) "
            "or use --method static"
        )
