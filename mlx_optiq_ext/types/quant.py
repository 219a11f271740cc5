"""Values of quantization: choices, units, the sensitivity table, the allocation.

Knows nothing of MLX or files. Made by ``measure`` and ``quant``; read by everything above.
"""

import re
from typing import Literal

import msgspec

from mlx_optiq_ext.errors import UsageError

__all__ = [
    "AFFINE_BITS",
    "AFFINE_GROUPS",
    "KEEP",
    "Allocation",
    "BitMap",
    "CalibrationInfo",
    "Choice",
    "Mode",
    "ModelFingerprint",
    "Pin",
    "Probe",
    "ProbeCheck",
    "SensitivityTable",
    "Unit",
    "UnitKind",
]

Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8", "keep"]
UnitKind = Literal["linear", "embedding", "head", "experts", "multilinear", "router"]

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
_FLOAT_MODES: dict[str, tuple[int, int]] = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_AFFINE_LABEL = re.compile(r"^(\d+)(?:(?:g|/)(\d+))?$")


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, order=True):
    """How one tensor is stored: ``bits`` per code, ``group_size`` weights per scale, ``mode``.

    ``mode="keep"`` leaves the tensor as it is in the source; then ``bits`` is 16 and ``group_size`` 0.
    """

    bits: int
    group_size: int
    mode: Mode = "affine"

    @property
    def label(self) -> str:
        """Short name, read back by :meth:`parse`: ``4g64``, ``mxfp4``, ``nvfp4``, ``mxfp8``, ``keep``."""
        return f"{self.bits}g{self.group_size}" if self.mode == "affine" else self.mode

    def stored_bits(self, numel: int, float_bits: int = 16) -> int:
        """Bits on disk for ``numel`` weights: codes, scales and biases.

        Args:
            numel: Number of weights; a multiple of ``group_size``.
            float_bits: Width of an unquantized number of this checkpoint (16 or 32): affine scales and
                biases have it, and so has a tensor that is kept.
        Source: mlx ``quantize``: affine keeps one scale and one bias of the weight's dtype per group,
            the mx and nv modes one 8-bit scale per group.
        """
        if self.mode == "keep":
            return numel * float_bits
        per_group = 2 * float_bits if self.mode == "affine" else 8
        return numel * self.bits + (numel // self.group_size) * per_group

    def bpw(self, float_bits: int = 16) -> float:
        """Stored bits per weight, scales and biases included (affine 4/64 with 16-bit scales: 4.5)."""
        numel = 4096
        return self.stored_bits(numel, float_bits) / numel

    def fits(self, last_dim: int) -> bool:
        """Whether a tensor whose last axis has ``last_dim`` weights can be stored so."""
        return self.mode == "keep" or last_dim % self.group_size == 0

    @classmethod
    def parse(cls, text: str, default_group: int = 64) -> "Choice":
        """Read ``4``, ``4g64``, ``4/64``, ``mxfp4``, ``nvfp4``, ``mxfp8``, ``keep`` (also ``16``, ``bf16``).

        Raises:
            UsageError: Not a storage MLX has.
        """
        word = text.strip().lower()
        if word in {"keep", "16", "bf16", "fp16"}:
            return KEEP
        if word in _FLOAT_MODES:
            bits, group = _FLOAT_MODES[word]
            return cls(bits=bits, group_size=group, mode=word)  # type: ignore[arg-type]
        match = _AFFINE_LABEL.match(word)
        if match:
            bits, group = int(match[1]), int(match[2] or default_group)
            if bits in AFFINE_BITS and group in AFFINE_GROUPS:
                return cls(bits=bits, group_size=group)
        raise UsageError(
            f"{text!r} is not a choice: use BITS or BITSgGROUP with bits in {AFFINE_BITS} and group in "
            f"{AFFINE_GROUPS} (such as 4g64), or one of mxfp4, nvfp4, mxfp8, keep"
        )


KEEP = Choice(bits=16, group_size=0, mode="keep")


class Unit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decision of the allocator: a tensor, or several that must be stored alike.

    ``paths`` are dotted module paths of mlx-lm's module tree; more than one where a runtime fuses the
    modules. A tied embedding and head are one module, hence one path. ``path`` (the first) is its name.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    """Weight shape of the first path, out × in; experts and multilinear have a leading axis."""
    numel: int
    """Weights in all paths together."""
    kind: UnitKind
    block: int | None = None
    """Index of the transformer block; None outside of blocks (embedding, head)."""
    module: str = ""
    """Role within the block, for heat maps: ``self_attn.q_proj``."""
    active_share: float = 1.0
    """Share of the weights read per decoded token (routed experts: used / all; an embedding: one row)."""
    floor: Choice | None = None
    """The model's own minimum (its ``quant_predicate``), never undercut unless pinned."""
    choices: tuple[Choice, ...] = ()
    """What this unit may become, in ascending order of stored bits."""

    @property
    def path(self) -> str:
        """Name of the unit: its first path."""
        return self.paths[0]


class Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Divergence caused by storing one unit as one choice, everything else exact."""

    path: str
    choice: Choice
    divergence: float
    """KL(reference ‖ changed), nats per token, mean over domains."""
    stderr: float = 0.0
    """Standard error of ``divergence`` over calibration windows."""
    by_domain: tuple[float, ...] = ()
    """The same per domain, in the order of :attr:`SensitivityTable.domains`."""
    exact: bool = False
    """True: a forward pass was run; False: second-order estimate."""


class CalibrationInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which text was used."""

    source: str
    sha256: str
    num_tokens: int
    num_windows: int
    domains: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What a reader should know: domains without enough text, records not rendered by the chat template."""


class ModelFingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What identifies a set of weights, so that artefacts of different models are never mixed."""

    model_type: str
    sha256: str
    """Over config.json and the name, shape, dtype and sampled bytes of every tensor."""
    source: str = ""
    """Repository id or folder name as the user gave it."""
    revision: str = ""
    origin: str = ""
    """Where the weights themselves come from, where that is known: ``imported from a Q4_1 GGUF file: …``."""


class ProbeCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far exact probes of single tensors were from their estimates; the table is not changed by it."""

    num_probes: int
    ratio: float
    """Median of exact / estimate."""
    low: float
    """A tenth of the ratios are below; a range of probes, no interval of ``ratio``."""
    high: float
    """A tenth of the ratios are above."""


class SensitivityTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All measurements of one model: enough to allocate for any budget without measuring again."""

    format_version: int = 1
    model: ModelFingerprint
    method: Literal["fisher", "kl", "static", "published"]
    reference: Literal["resident", "stream", "none"]
    correction: Literal["none", "fast", "full"]
    calibration: CalibrationInfo
    domains: tuple[str, ...]
    units: tuple[Unit, ...]
    probes: tuple[Probe, ...]
    total_numel: int
    """All weights of the model, units or not."""
    fixed_bits: int
    """Stored bits of everything that is no unit (norms, biases, convolutions, state parameters)."""
    float_bits: int = 16
    """Width of unquantized numbers in the checkpoint that will be written."""
    notes: tuple[str, ...] = ()
    """What a reader should know: refused parts, low coverage of experts, quadratic regime left."""
    forward_equivalents: float = 0.0
    """Cost of the measurement in forward passes over the calibration text."""
    code_version: str = ""
    probe_check: ProbeCheck | None = None
    """None where no exact probe was run beside the estimates."""
    column_importance: dict[str, tuple[float, ...]] = {}
    """Per embedding and transposed head: how much an error in each column is felt (E[g_j²])."""


class Pin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice that was forced on a unit."""

    path: str
    choice: Choice
    reason: str
    cost_divergence: float = 0.0
    """Predicted divergence added by the pin at this budget, nats per token (negative: none lost)."""
    cost_bits: int = 0
    """Stored bits against what the allocator would have picked."""


class BitMap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every quantizable module path and its choice; the plan that a checkpoint must match."""

    choices: dict[str, Choice]


class Allocation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A bit map with its budget and its prediction."""

    format_version: int = 1
    bit_map: BitMap
    target_bpw: float
    budget: str = ""
    """What set the ceiling: ``--target-bpw 5``; for ``--fit`` with what weights, cache and head room get."""
    achieved_bpw: float
    """All stored bits over all weights."""
    nbytes: int
    predicted_divergence: float
    """Sum of the table's estimates, with the table's rounding; not corrected by exact probes."""
    predicted_stderr: float = 0.0
    """Spread over calibration windows alone, added up over units. It says nothing of how far the estimate is
    from the truth, so it makes no interval of ``predicted_divergence`` and none is shown."""
    lower_bound: float = 0.0
    """No allocation within the budget can be predicted below this."""
    solver: str = "exact"
    pins: tuple[Pin, ...] = ()
    uniform: tuple[tuple[str, float, float], ...] = ()
    """For comparison: (label, bpw, divergence) of every uniform choice, predicted with the table's rounding;
    stock mlx-lm rounds plainly and is further off."""
    worst_domain: str = ""
    worst_domain_divergence: float = 0.0
    """Predicted in that domain alone, nats per token."""
    correction: Literal["none", "fast", "full"] = "none"
