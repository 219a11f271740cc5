"""What a checkpoint says about how it was made."""

from typing import Literal

import msgspec

from mlx_optiq_ext.types.quant import Allocation, BitMap, CalibrationInfo, ModelFingerprint
from mlx_optiq_ext.types.verify import VerifyReport

__all__ = ["IMPORT_FILE", "CheckpointMetadata", "ImportRecord", "MeasuredDivergence", "PublishedMetadata"]

IMPORT_FILE = "optiq_import.json"
"""Where a folder made by ``optiq import-gguf`` keeps its :class:`ImportRecord`."""


class ImportRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder was imported from; mlx-lm and transformers do not read it."""

    format_version: int = 1
    package_version: str
    file: str
    """Name of the GGUF file."""
    stored_types: dict[str, int]
    """Weights per GGUF storage type: ``{"Q4_1": 134479872, "F32": 35136}``."""
    dtype: str
    """Float type the weights were written as."""


class MeasuredDivergence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KL(reference ‖ checkpoint) on held-out text, nats per token."""

    divergence: float
    stderr: float
    half_width: float = 0.0
    """Half of the 95 % interval (Student's t over windows)."""
    held_out: CalibrationInfo


class CheckpointMetadata(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Our ``optiq/metadata.json``."""

    format_version: int = 1
    package: str = "mlx-optiq-ext"
    package_version: str
    base_model: str
    """Repository id or folder of the source, as given."""
    base_revision: str = ""
    """Commit of the Hub; empty for a folder."""
    model: ModelFingerprint
    method: Literal["fisher", "kl", "static", "published"]
    """How the sensitivities were found."""
    reference: Literal["resident", "stream", "none"]
    """What probes were compared with."""
    calibration: CalibrationInfo
    sensitivity_sha256: str = ""
    """Of ``optiq/sensitivity.json``, the table this allocation was made from."""
    allocation: Allocation
    measured: MeasuredDivergence | None = None
    """Beside ``allocation.predicted_divergence``; None where nothing was scored."""
    verification: VerifyReport | None = None
    values_rotated: tuple[int, ...] = ()
    """Blocks whose weights make rotated values, as config.json says under ``optiq_kv``."""
    command: str = ""
    """What a reader would run to make this checkpoint again."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def bit_map(self) -> BitMap:
        """Choice of every quantizable path."""
        return self.allocation.bit_map


class PublishedMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The part that we use of the metadata of the published ``mlx-optiq`` package (0.7 and older)."""

    base_model: str
    method: str
    reference: str
    target_bpw: float | None
    achieved_bpw: float | None
    """As that package counts: without scales, biases and what it did not measure."""
    bit_map: BitMap
