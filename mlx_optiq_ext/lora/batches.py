"""Which examples make an update, and their tokens as arrays.

Examples of like length stand together, so that little is padded. The order is a function of the seed and the
number of the update, so a training that goes on needs no memory of it. Knows nothing of losses.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.lora.masks import Pair, Sample
from mlx_optiq_ext.types.training import TrainOptions

__all__ = ["Batch", "Order", "collate", "fit_length"]

_T = TypeVar("_T", Sample, Pair)
_WINDOW = 64
"""Updates whose examples are sorted by length together; between such windows all is shuffled."""


class Batch(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """``B`` rows of ``T`` tokens padded at the right, and the ``N`` tokens to be predicted."""

    inputs: NDArray[np.int32]
    """(B, T): every token but the last of each row."""
    positions: NDArray[np.int32]
    """(N,): where in the flattened inputs each learnt token is predicted."""
    targets: NDArray[np.int32]
    """(N,): the learnt tokens."""
    rows: NDArray[np.int32]
    """(N,): the row of each."""
    num_tokens: int
    """Without padding."""

    @property
    def weight(self) -> int:
        """Number of learnt tokens."""
        return len(self.targets)


class Order:
    """Indices of the examples of every update.

    Args:
        lengths: Tokens of every example.
        per_update: Examples per update; the last of an epoch may have fewer.
        seed: Decides the order.
    """

    def __init__(self, lengths: Sequence[int], per_update: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._per_update = per_update
        self._seed = seed
        self._epoch = -1
        self._groups: list[NDArray[np.intp]] = []

    @property
    def updates_per_epoch(self) -> int:
        """Updates that every example takes part in once."""
        return -(-len(self._lengths) // self._per_update)

    def num_updates(self, options: TrainOptions) -> int:
        """Updates of a whole training."""
        return options.steps or options.epochs * self.updates_per_epoch

    def update(self, number: int) -> list[int]:
        """Examples of one update, counted from 0, by length."""
        epoch, position = divmod(number, self.updates_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._groups = epoch, self._arrange(epoch)
        return [int(index) for index in self._groups[position]]

    def padded_share(self, batch_size: int) -> float:
        """Part of the first epoch's positions that is padding, with batches of ``batch_size`` rows."""
        positions = 0
        for group in self._arrange(0):
            for at in range(0, len(group), batch_size):
                lengths = self._lengths[group[at : at + batch_size]]
                positions += int(lengths.max()) * len(lengths)
        return 1 - int(self._lengths.sum()) / positions

    def _arrange(self, epoch: int) -> list[NDArray[np.intp]]:
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = rng.permutation(len(self._lengths))
        window = _WINDOW * self._per_update
        groups = []
        for at in range(0, len(shuffled), window):
            members = shuffled[at : at + window]
            by_length = members[np.argsort(self._lengths[members], kind="stable")]
            groups += [
                by_length[i : i + self._per_update] for i in range(0, len(by_length), self._per_update)
            ]
        return [groups[index] for index in rng.permutation(len(groups))]


def fit_length(items: Sequence[_T], max_length: int) -> tuple[list[_T], list[str]]:
    """Cut examples to a length, and drop those with nothing left to learn.

    Returns:
        Examples, and notes of what was cut and dropped, naming the first.
    Raises:
        UsageError: None is left.
    """
    kept: list[_T] = []
    cut: list[str] = []
    dropped: list[str] = []
    for item in items:
        short = item.cut(max_length)
        if short is not item and short != item:
            cut.append(item.where)
        parts = (short,) if isinstance(short, Sample) else (short.chosen, short.rejected)
        if all(part.num_learnt > 0 for part in parts):
            kept.append(short)
        else:
            dropped.append(item.where)
    notes = []
    if cut:
        notes.append(f"{len(cut)} of {len(items)} examples are cut to {max_length} tokens ({cut[0]}, …)")
    if dropped:
        notes.append(
            f"{len(dropped)} of {len(items)} have nothing to learn within them ({dropped[0]}, …), left out"
        )
    if not kept:
        raise UsageError(
            f"no example has anything to learn in its first {max_length} tokens; raise --max-length"
        )
    return kept, notes


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into one batch."""
    lengths = [len(sample.tokens) - 1 for sample in samples]
    width = max(lengths)
    inputs = np.zeros((len(samples), width), dtype=np.int32)
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, sample in enumerate(samples):
        inputs[row, : lengths[row]] = sample.tokens[:-1]
        for begin, end in sample.spans:
            learnt = range(max(begin, 1), end)
            positions += [row * width + index - 1 for index in learnt]
            targets += [sample.tokens[index] for index in learnt]
            rows += [row] * len(learnt)
    return Batch(
        inputs=inputs,
        positions=np.array(positions, dtype=np.int32),
        targets=np.array(targets, dtype=np.int32),
        rows=np.array(rows, dtype=np.int32),
        num_tokens=sum(len(sample.tokens) for sample in samples),
    )
