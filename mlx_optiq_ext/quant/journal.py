"""Keep finished units of a measurement, so that a stopped one goes on where it was.

One JSON line per unit behind a first line that says what was measured; a measurement of anything else
(other model, calibration, choices, code) has a journal of its own. The finished table is kept beside it,
for a conversion that is stopped later. Knows nothing of how costs are computed.
"""

import glob
import hashlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import unwritable, write_bytes_atomic
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.measure.calibration import Windows
from mlx_optiq_ext.quant.sources import measuring_code
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import ModelFingerprint, SensitivityTable

__all__ = ["Journal", "discard_journal", "journal_key", "journal_path"]

Floats = npt.NDArray[np.float64]
_NOT_IN_KEY = ("resume", "probes", "reference", "revision", "calibration", "trust_remote_code")
"""Options that do not change costs, or whose effect other parts of the key hold."""


class _Line(msgspec.Struct, frozen=True):
    path: str
    costs: list[list[float]]
    gain: list[float] | None = None


def journal_key(
    model: ModelFingerprint,
    windows: Windows,
    options: MeasureOptions,
    float_dtype: str,
    edited: str = "",
) -> str:
    """Hash of everything that the costs depend on; the code that measures is part of it.

    Args:
        model: What was measured.
        windows: The tokens themselves count, which another tokenizer makes of the same text.
        options: How it is measured.
        float_dtype: Stored type of scales and biases.
        edited: What was done to the weights before (:attr:`Reference.edited`).
    """
    relevant = {
        name: value for name, value in msgspec.structs.asdict(options).items() if name not in _NOT_IN_KEY
    }
    tokens = np.ascontiguousarray(windows.tokens)
    parts = [
        *(model.sha256, windows.info.sha256, windows.info.domains, tokens.shape, str(tokens.dtype)),
        *(relevant, float_dtype, measuring_code()),
        *((edited,) if edited else ()),
    ]
    digest = hashlib.sha256(msgspec.json.encode(parts, order="sorted"))
    digest.update(tokens.tobytes())
    digest.update(np.ascontiguousarray(windows.domain_index).tobytes())
    return digest.hexdigest()


def journal_path(file: Path, key: str) -> Path:
    """Where the journal of one measurement lies, beside those of others with the same output.

    Args:
        file: Name that belongs to the output.
        key: See :func:`journal_key`.
    """
    return file.with_name(f"{file.name}.{key[:16]}")


def discard_journal(file: Path) -> None:
    """Delete all journals of an output and the tables beside them: the result is where it belongs.

    Args:
        file: What :meth:`Journal.open` was given.
    """
    for kept in file.parent.glob(f"{glob.escape(file.name)}.*"):
        kept.unlink(missing_ok=True)


class Journal:
    """Finished units in a file, or nowhere.

    Args:
        file: Its own file, opened for appending; None keeps nothing.
        costs: What it held already: path → (C, W).
    """

    def __init__(self, file: Path | None, costs: dict[str, Floats]) -> None:
        self._file = file
        self.costs = costs
        self.resumed = frozenset(costs)
        """Paths that an earlier run had measured."""
        self.gains: dict[str, Floats] = {}
        """Per path what the costs of each choice were multiplied by (C,); see ``errors_of.Costs``."""

    @classmethod
    def open(cls, file: Path | None, key: str, *, resume: bool) -> "Journal":
        """Continue the journal of the same key, or start a new one.

        A half-written last line (the process was killed) is dropped.

        Args:
            file: Name that belongs to the output; :func:`journal_path` makes it that of the key.
            key: What is measured.
            resume: False starts anew; journals of other keys stay.
        """
        if file is None:
            return cls(None, {})
        file = journal_path(file, key)
        costs: dict[str, Floats] = {}
        gains: dict[str, Floats] = {}
        if resume and file.is_file():
            lines = file.read_bytes().split(b"\n")
            if lines[0].strip() == key.encode():
                for line in lines[1:]:
                    try:
                        entry = msgspec.json.decode(line, type=_Line)
                    except msgspec.DecodeError:
                        continue
                    costs[entry.path] = np.array(entry.costs, dtype=np.float64)
                    if entry.gain is not None:
                        gains[entry.path] = np.array(entry.gain, dtype=np.float64)
        else:
            for table in file.parent.glob(f"{glob.escape(file.name)}-*.table"):
                table.unlink()
        written = [key.encode(), *(_encode(path, c, gains.get(path)) for path, c in costs.items())]
        write_bytes_atomic(file, b"\n".join(written) + b"\n")
        journal = cls(file, costs)
        journal.gains = gains
        return journal

    def announcement(self, total: int) -> str:
        """Say what an earlier run had measured, and where that is kept; empty where it was nothing.

        Args:
            total: Tensors that are measured in all.
        """
        if not self.resumed:
            return ""
        return f"resuming: {len(self.resumed)} of {total} tensors measured already, from {self._file}"

    def add(self, path: str, costs: Floats, gain: Floats | None = None) -> None:
        """Keep one finished unit.

        Raises:
            ResourceError: It cannot be written (the disk is full).
        """
        self.costs[path] = costs
        if gain is not None:
            self.gains[path] = gain
        if self._file is None:
            return
        try:
            with self._file.open("ab") as stream:
                stream.write(_encode(path, costs, gain) + b"\n")
        except OSError as error:
            raise unwritable(self._file, error) from error

    def finish(self, table: SensitivityTable, probes: int) -> None:
        """Keep the finished table.

        Args:
            probes: Exact probes that were asked for; the table's notes depend on them.
        """
        if self._file is not None:
            write_sensitivity(self._table_file(probes), table)

    def finished(self, probes: int) -> SensitivityTable | None:
        """The table that a former run finished, if it did."""
        if self._file is None or not self._table_file(probes).is_file():
            return None
        try:
            return read_sensitivity(self._table_file(probes))
        except UsageError:
            return None

    def _table_file(self, probes: int) -> Path:
        assert self._file is not None
        return self._file.with_name(f"{self._file.name}-{probes}.table")


def _encode(path: str, costs: Floats, gain: Floats | None) -> bytes:
    return msgspec.json.encode(_Line(path, costs.tolist(), None if gain is None else gain.tolist()))
