"""Keep finished units of a measurement, so that a stopped one goes on where it was.

One JSON line per unit behind a first line that says what was measured; a journal of anything else (other
model, calibration, choices, code) is started anew. Knows nothing of how costs are computed.
"""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext import __version__
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import CalibrationInfo, ModelFingerprint

__all__ = ["Journal", "journal_key"]

Floats = npt.NDArray[np.float64]
_NOT_IN_KEY = ("resume", "probes", "reference")


class _Line(msgspec.Struct, frozen=True):
    path: str
    costs: list[list[float]]


def journal_key(model: ModelFingerprint, calibration: CalibrationInfo, options: MeasureOptions) -> str:
    """Hash of everything that the costs depend on."""
    relevant = {
        name: value for name, value in msgspec.structs.asdict(options).items() if name not in _NOT_IN_KEY
    }
    parts = [model.sha256, calibration.sha256, calibration.num_windows, relevant, __version__]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


class Journal:
    """Finished units in a file, or nowhere.

    Args:
        file: Opened for appending; None keeps nothing.
        costs: What it held already: path → (C, W).
    """

    def __init__(self, file: Path | None, costs: dict[str, Floats]) -> None:
        self._file = file
        self.costs = costs

    @classmethod
    def open(cls, file: Path | None, key: str, *, resume: bool) -> "Journal":
        """Continue the journal of the same key, or start a new one.

        A half-written last line (the process was killed) is dropped.
        """
        if file is None:
            return cls(None, {})
        costs: dict[str, Floats] = {}
        if resume and file.is_file():
            lines = file.read_bytes().split(b"\n")
            if lines[0].strip() == key.encode():
                for line in lines[1:]:
                    try:
                        entry = msgspec.json.decode(line, type=_Line)
                    except msgspec.DecodeError:
                        continue
                    costs[entry.path] = np.array(entry.costs, dtype=np.float64)
        file.parent.mkdir(parents=True, exist_ok=True)
        written = [key.encode(), *(_encode(path, values) for path, values in costs.items())]
        file.write_bytes(b"\n".join(written) + b"\n")
        return cls(file, costs)

    def add(self, path: str, costs: Floats) -> None:
        """Keep one finished unit."""
        self.costs[path] = costs
        if self._file is not None:
            with self._file.open("ab") as stream:
                stream.write(_encode(path, costs) + b"\n")

    def remove(self) -> None:
        """Delete the file: the table is written."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _encode(path: str, costs: Floats) -> bytes:
    return msgspec.json.encode(_Line(path, costs.tolist()))
