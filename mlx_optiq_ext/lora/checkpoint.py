"""A stopped training on disk: one file that is complete or not there, and the metrics up to it.

Knows nothing of models; arrays go by name. Called by ``loop`` and ``train``.
"""

import io
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import unwritable, write_bytes_atomic
from mlx_optiq_ext.types.training import METRICS_FILE, Metric

__all__ = ["CHECKPOINT_FILE", "Arrays", "Interval", "Store", "TrainState", "read_metrics"]

CHECKPOINT_FILE = "checkpoint.safetensors"
_FORMAT_VERSION = 1

Arrays: TypeAlias = dict[str, dict[str, mx.array]]
"""Group (adapter, optimizer, best, reference) → name → array."""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Sums since the last line of metrics."""

    loss: float = 0.0
    weight: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    values: dict[str, float] = {}


class TrainState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a training stands after an update, beside its arrays."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    interval: Interval = Interval()
    best_step: int | None = None
    best_loss: float | None = None
    misses: int = 0
    """Validations since the lowest loss."""


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    settings: dict[str, str]
    state: TrainState


class Store:
    """The folder that a training writes into.

    Args:
        folder: Made where it is missing.
        settings: All that the result depends on, by name: model, data, ranks and every option.
    """

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self._settings = settings

    @property
    def file(self) -> Path:
        """The checkpoint."""
        return self._folder / CHECKPOINT_FILE

    def save(self, state: TrainState, arrays: Arrays) -> None:
        """Replace the checkpoint in one step.

        Raises:
            ResourceError: It cannot be written.
        """
        header = _Header(format_version=_FORMAT_VERSION, settings=self._settings, state=state)
        named = {f"{group}/{name}": array for group, part in arrays.items() for name, array in part.items()}
        buffer = io.BytesIO()
        metadata = {"optiq": msgspec.json.encode(header).decode(), "format": "mlx"}
        mx.save_safetensors(buffer, named, metadata)
        write_bytes_atomic(self.file, buffer.getvalue())

    def load(self) -> tuple[TrainState, Arrays] | None:
        """The checkpoint of the same training, evaluated; None where there is none.

        Raises:
            UsageError: The file is damaged, or of a training with other settings; names them.
        """
        if not self.file.is_file():
            return None
        remedy = f"remove {self.file} or add --no-resume to start anew, or choose another output with -o"
        try:
            loaded: Any = mx.load(str(self.file), return_metadata=True)
            named, metadata = loaded
            header = msgspec.json.decode(metadata["optiq"], type=_Header)
            mx.eval(named)
        except (RuntimeError, KeyError, msgspec.DecodeError) as error:
            raise UsageError(f"{self.file} is no readable checkpoint ({error}); {remedy}") from error
        if header.format_version != _FORMAT_VERSION:
            raise UsageError(
                f"{self.file} has format version {header.format_version}, this package reads "
                f"{_FORMAT_VERSION}; {remedy}"
            )
        names = sorted(header.settings.keys() | self._settings.keys())
        changed = [name for name in names if header.settings.get(name) != self._settings.get(name)]
        if changed:
            raise UsageError(
                f"{self.file} is of an unfinished training with other settings ({', '.join(changed)}); "
                f"{remedy}"
            )
        arrays: Arrays = {}
        for name, array in named.items():
            group, _, rest = name.partition("/")
            arrays.setdefault(group, {})[rest] = array
        return header.state, arrays

    def discard(self) -> None:
        """Remove the checkpoint: the result is where it belongs, or the training starts anew."""
        self.file.unlink(missing_ok=True)

    def start_metrics(self, step: int | None) -> None:
        """Drop the lines of metrics of later updates than ``step``, which will be made again; None: all."""
        file = self._folder / METRICS_FILE
        kept = [metric for metric in read_metrics(file) if step is not None and metric.step <= step]
        write_bytes_atomic(file, b"".join(msgspec.json.encode(metric) + b"\n" for metric in kept))

    def add_metric(self, metric: Metric) -> None:
        """Write one line of metrics.

        Raises:
            ResourceError: It cannot be written.
        """
        file = self._folder / METRICS_FILE
        try:
            with file.open("ab") as stream:
                stream.write(msgspec.json.encode(metric) + b"\n")
        except OSError as error:
            raise unwritable(file, error) from error


def read_metrics(file: Path) -> list[Metric]:
    """Lines of metrics; none where there is no file. A line cut off by a crash is left out."""
    if not file.is_file():
        return []
    metrics: list[Metric] = []
    for line in file.read_bytes().split(b"\n"):
        try:
            metrics.append(msgspec.json.decode(line, type=Metric))
        except msgspec.DecodeError:
            continue
    return metrics
