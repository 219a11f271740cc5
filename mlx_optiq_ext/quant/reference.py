"""The reference model of a measurement, prepared: module tree, units, windows, memory.

Knows how a model is held (resident or one block at a time); not what is measured on it.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_optiq_ext.errors import ResourceError, UsageError
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.check import unpackable_paths
from mlx_optiq_ext.models.load import (
    cast_floats,
    compute_dtype,
    float_dtype,
    load_model,
    load_tokenizer,
    resident_nbytes,
)
from mlx_optiq_ext.models.memory import BlockMemory, StreamedMemory
from mlx_optiq_ext.models.walk import fixed_bits, list_units
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import AFFINE_GROUPS, Choice, Unit

__all__ = ["Reference", "available_nbytes", "open_reference", "parse_candidates"]


class Reference:
    """A model ready to be run block by block.

    Args:
        ref: Where it is.
        trust_remote_code: Run code of the checkpoint.
        how: ``resident``, ``stream``, or ``auto`` (resident where the weights take at most half of the
            memory that is free).
    Raises:
        UnsupportedModel: mlx-lm cannot build it, or it is quantized already.
        ResourceError: ``resident`` was asked for and does not fit.
    """

    def __init__(
        self,
        ref: ModelRef,
        *,
        trust_remote_code: bool = False,
        how: Literal["auto", "resident", "stream"] = "auto",
    ) -> None:
        self.ref = ref
        self._trust = trust_remote_code
        self.model, self.config = load_model(ref, trust_remote_code=trust_remote_code)
        self.stored_dtype = float_dtype(self.model, self.config)
        self.dtype = compute_dtype()
        needed, free = resident_nbytes(self.model, self.dtype), available_nbytes()
        if how == "resident" and needed > free:
            raise ResourceError(
                f"{ref.source} takes {needed / 1e9:.1f} GB in {self.dtype} and {free / 1e9:.1f} GB are free; "
                "use --reference stream, which holds one block at a time"
            )
        self.how: Literal["resident", "stream"] = "stream"
        if how == "resident" or (how == "auto" and needed <= free // 2):
            self.how = "resident"
        self._source_dtypes = {name: array.dtype for name, array in named_arrays(self.model.parameters())}
        self._may_cast = getattr(self.model, "cast_predicate", lambda _: True)
        cast_floats(self.model, self.dtype)
        self._unpackable: set[str] | None = None
        self._edits: list[Callable[[nn.Module], None]] = []
        self.edited = ""
        """Names what was done to the weights; measurements of other weights are others."""
        self.edit_notes: tuple[str, ...] = ()
        self.model.train()  # gives the differentiable form of kernels that have no gradient

    def units(self, candidates: tuple[Choice, ...]) -> tuple[Unit, ...]:
        """Units with the choices that fit them."""
        if self._unpackable is None:
            self._unpackable = unpackable_paths(self.model) | self._kept_wider()
        return list_units(self.model, self.config, candidates, unpackable=self._unpackable)

    def memory(self) -> BlockMemory:
        """What makes a block's weights present for a pass."""
        if self.how == "resident":
            mx.eval(self.model.parameters())
            return BlockMemory()
        return StreamedMemory(self.model, self.fresh)

    def fresh(self) -> nn.Module:
        """The same model again with lazy weights."""
        model, _ = load_model(self.ref, trust_remote_code=self._trust)
        cast_floats(model, self.dtype)
        for change in self._edits:
            change(model)
        return model

    def edit(self, change: Callable[[nn.Module], None], name: str, notes: tuple[str, ...] = ()) -> None:
        """Change the weights, here and in every :meth:`fresh` model, before anything is done with them.

        Args:
            change: Replaces parameters by lazy ones of the same shape and type, in the compute type.
            name: What it does and where, for the key of a measurement.
            notes: What a reader of the result should know.
        """
        change(self.model)
        self._edits.append(change)
        self.edited = "; ".join(filter(None, (self.edited, name)))
        self.edit_notes = (*self.edit_notes, *notes)

    def written_dtype(self, name: str, dtype: mx.Dtype) -> mx.Dtype:
        """Type that an unquantized parameter is stored in: ``dtype`` where the family lets it be cast.

        Source: stock ``mlx_lm.convert``, which asks the family's ``cast_predicate``.
        """
        source = self._source_dtypes[name]
        return dtype if mx.issubdtype(source, mx.floating) and self._may_cast(name) else source

    def fixed_bits(self, units: Sequence[Unit]) -> int:
        """Stored bits of everything that no choice changes, in the types that will be written."""
        stored = self.stored_dtype
        return fixed_bits(self.model, units, stored.size * 8, lambda name: self.written_dtype(name, stored))

    def _kept_wider(self) -> set[str]:
        """Modules whose weight the family keeps in a type of another width than the checkpoint's."""
        return {
            name.removesuffix(".weight")
            for name, source in self._source_dtypes.items()
            if name.endswith(".weight") and not self._may_cast(name) and source.size != self.stored_dtype.size
        }

    def tokenizer(self) -> TokenizerWrapper:
        """The model's tokenizer."""
        return load_tokenizer(self.ref, trust_remote_code=self._trust)


def open_reference(ref: ModelRef, options: MeasureOptions) -> Reference:
    """Open a model as the options ask."""
    return Reference(ref, trust_remote_code=options.trust_remote_code, how=options.reference)


def parse_candidates(options: MeasureOptions) -> tuple[Choice, ...]:
    """Choices named by ``--candidate-bits`` and ``--candidate-groups``.

    A bare width stands for itself at every candidate group; one with a group, or a float mode, for itself.

    Raises:
        UsageError: A word is neither, or no choice is named.
    """
    groups = [_parse_group(word) for word in options.candidate_groups.split(",") if word.strip()] or [64]
    found: dict[Choice, None] = {}
    for word in options.candidate_bits.split(","):
        if word.strip():
            for group in groups:
                found[Choice.parse(word, default_group=group)] = None
    if not found:
        raise UsageError("--candidate-bits names no choice; give some, such as 2,3,4,5,6,8")
    return tuple(sorted(found, key=lambda c: (c.bpw(), c)))


def _parse_group(word: str) -> int:
    if word.strip() not in {str(group) for group in AFFINE_GROUPS}:
        raise UsageError(f"--candidate-groups: {word.strip()!r} is not one of {AFFINE_GROUPS}")
    return int(word)


def available_nbytes() -> int:
    """Memory that can be used now, in bytes."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    if mx.default_device().type != mx.DeviceType.cpu and "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"]) - mx.get_active_memory()
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _left_in_container())
    if sys.platform == "darwin":
        out = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "hw.memsize"], capture_output=True, text=True, check=False
        )
        if out.returncode == 0:
            return int(out.stdout) * 3 // 4
    return 8 << 30


def _left_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a Linux container may still take; without a limit, more than any machine has.

    Source: Linux kernel documentation, "Control Group v2", memory.max, memory.current and memory.stat.
    """
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    return int(limit) - used + int(stat.get("inactive_file", 0)) if limit.isdigit() else 1 << 62
