"""Logits of a model on windows of text, a few windows at a time.

The reference's are kept for all comparisons: in memory while they are small, else in a temporary file, so
memory does not grow with text × vocabulary.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import FingerprintMismatch
from mlx_optiq_ext.formats.atomic import check_disk_space

__all__ = ["LogitCache", "require_vocabulary", "window_logits"]

FloatRows = npt.NDArray[np.float32]

_BATCH_NBYTES = 128 << 20
_IN_MEMORY_NBYTES = 512 << 20


def window_logits(
    model: nn.Module, tokens: npt.NDArray[np.int32], vocab_size: int | None = None
) -> Iterator[tuple[int, mx.array]]:
    """Run a model over windows.

    Args:
        model: Takes (B, T) tokens, returns (B, T, V) logits.
        tokens: (W, T) int32.
        vocab_size: Refuse a model with another V; None takes what comes.
    Yields:
        Index of a window and its (T, V) logits in float32.
    Raises:
        FingerprintMismatch: The vocabulary differs from ``vocab_size``.
    Cost: one forward; at most 128 MiB of logits at a time (or one window's).
    """
    step = 1
    start = 0
    while start < len(tokens):
        batch = tokens[start : start + step]
        run: Any = model
        logits = run(mx.array(batch)).astype(mx.float32)
        mx.eval(logits)
        if vocab_size is not None and logits.shape[-1] != vocab_size:
            raise FingerprintMismatch(
                f"the model has {logits.shape[-1]} logits where the reference has {vocab_size}: "
                "it is no quantization of this reference; give the model it was made from as REF"
            )
        for offset in range(len(batch)):
            yield start + offset, logits[offset]
        start, step = start + len(batch), max(1, _BATCH_NBYTES * len(batch) // logits.nbytes)
        del logits
        mx.clear_cache()


def require_vocabulary(found: int, wanted: int) -> None:
    """Refuse a model with another number of logits than its reference.

    Raises:
        FingerprintMismatch: They differ.
    """
    if found != wanted:
        raise FingerprintMismatch(
            f"the model has {found} logits where the reference has {wanted}: "
            "it is no quantization of this reference"
        )


class LogitCache:
    """Logits of all windows, (W, T, V) float32.

    Use as a context manager: a temporary file goes when it ends.
    """

    def __init__(self, num_windows: int) -> None:
        self._num_windows = num_windows
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rows: FloatRows | None = None

    def __enter__(self) -> "LogitCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._rows = None
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def vocab_size(self) -> int | None:
        """V, once the first window is there."""
        return None if self._rows is None else int(self._rows.shape[-1])

    def put(self, window: int, rows: mx.array) -> None:
        """Keep one window's logits.

        Raises:
            ResourceError: They need a file, and the disk has no room for it.
        """
        if self._rows is None:
            self._rows = self._allocate((self._num_windows, *rows.shape))
        self._rows[window] = np.array(rows, copy=None)

    def get(self, window: int) -> mx.array:
        """One window's logits; :meth:`put` came before."""
        assert self._rows is not None
        return mx.array(self._rows[window])

    def _allocate(self, shape: tuple[int, ...]) -> FloatRows:
        nbytes = 4 * int(np.prod(shape, dtype=np.int64))
        if nbytes <= _IN_MEMORY_NBYTES:
            return np.empty(shape, dtype=np.float32)
        self._folder = tempfile.TemporaryDirectory(prefix="optiq-score-")
        path = Path(self._folder.name) / "reference.f32"
        check_disk_space(path, nbytes)
        rows: FloatRows = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
        return rows
