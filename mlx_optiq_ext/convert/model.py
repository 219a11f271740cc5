"""The whole conversion as one readable function: measure, allocate, rewrite, verify, score, describe.

Called by ``optiq convert`` and by the stock commands' "optiq" recipe. The output, an ordinary MLX
checkpoint, appears under its name only when it is complete and verified.
"""

import hashlib
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import msgspec
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.allocate.kv_memory import kv_bytes_per_token
from mlx_optiq_ext.convert.describe import card_text, command_line, read_card
from mlx_optiq_ext.convert.given import (
    calibration_notes,
    check_given,
    given_allocation,
    match_correction,
    restrict_candidates,
)
from mlx_optiq_ext.convert.opening import open_source
from mlx_optiq_ext.convert.rewrite import Rewriter
from mlx_optiq_ext.convert.scoring import measured_divergence, score_conversion
from mlx_optiq_ext.convert.table import outline_table, read_table
from mlx_optiq_ext.formats.atomic import atomic_folder, check_disk_space, require_absent, write_bytes_atomic
from mlx_optiq_ext.formats.metadata import write_metadata
from mlx_optiq_ext.formats.sensitivity import encode_sensitivity, write_sensitivity
from mlx_optiq_ext.hub.upload import check_upload, upload_folder
from mlx_optiq_ext.kv.fold import rotated_blocks
from mlx_optiq_ext.measure.calibration import Windows, load_windows
from mlx_optiq_ext.quant.correct import Level
from mlx_optiq_ext.quant.journal import discard_journal
from mlx_optiq_ext.quant.reference import Reference
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.quant.verify import verify_checkpoint
from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ConvertOptions
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import Allocation, BitMap, SensitivityTable
from mlx_optiq_ext.types.score import SCORE_FILE, ScoreReport
from mlx_optiq_ext.types.verify import VerifyReport

__all__ = ["ConversionResult", "convert_model", "expand_bit_map", "work_folder"]

_JOURNAL = "journal.jsonl"
_REWRITE_TOKENS = 8192
"""Tokens whose inputs weigh the rounding error: more than are needed to rank tensors."""


class _Checked(NamedTuple):
    """What is known before the long work."""

    reference: Reference
    given: SensitivityTable | None
    """The user's own sensitivity file."""
    options: ConvertOptions
    """With the correction of that file."""


class ConversionResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a conversion made."""

    out: str
    allocation: Allocation
    verification: VerifyReport | None = None
    score: ScoreReport | None = None
    forward_equivalents: float = 0.0
    seconds: float = 0.0
    peak_nbytes: int = 0
    """Most memory that MLX held at once."""
    notes: tuple[str, ...] = ()
    values_rotated: tuple[int, ...] = ()
    """Blocks whose weights make rotated values."""


def work_folder(out: Path) -> Path:
    """Where an interrupted conversion to ``out`` keeps what it measured."""
    return out.with_name(f".{out.name}.optiq-work")


def convert_model(
    ref: ModelRef,
    options: ConvertOptions,
    out: Path,
    *,
    progress: ProgressSink = ignore_progress,
    given: Collection[str] = (),
) -> ConversionResult:
    """Turn a model into a mixed-precision MLX checkpoint within a budget.

    A stopped conversion leaves its measurements in :func:`work_folder`; the same call continues them.
    Stopped while it scores, it completes the checkpoint without a score and only then ends.

    Args:
        ref: The unquantized model.
        options: How to measure and what to spend: exactly one target, or a bit map file.
        out: Folder to make; must not exist.
        given: Names of the options that the user set, where that is known: with a sensitivity file those
            that only a measurement would obey or that contradict it are refused; candidates choose from it.
        progress: Stages ``forward``, ``measure``, ``probe``, ``write``, ``score``.
    Raises:
        OutputExists, BudgetInfeasible, UsageError, ModelError, ResourceError: Before any long work.
        MeasurementError: A number is not finite.
        VerificationError: What was written is not what was planned; it is kept as ``OUT.incomplete``.
        KeyboardInterrupt: Stopped; while scoring, after ``out`` is in place.
    """
    started = time.monotonic()
    mx.reset_peak_memory()
    reference, given_table, options = _check(ref, options, out, given)
    table = given_table or measure_sensitivity(
        ref, options.measure, journal_file=work_folder(out) / _JOURNAL, progress=progress, reference=reference
    )
    allocation = replace(_allocate(table, options, reference), correction=_level(options))
    bit_map, edits = expand_bit_map(table, allocation), reference.edit_notes
    with atomic_folder(out) as folder:
        fallbacks = _write(reference, table, bit_map, options, folder, progress)
        result = ConversionResult(
            out=str(out),
            allocation=allocation,
            forward_equivalents=table.forward_equivalents,
            peak_nbytes=int(mx.get_peak_memory()),
            notes=(*table.notes, *edits, *_table_notes(table, options), *_fallback_notes(fallbacks)),
            values_rotated=rotated_blocks(reference.config),
        )
        del reference
        mx.clear_cache()
        if options.verify:
            report = verify_checkpoint(
                folder, bit_map, expected_nbytes=allocation.nbytes,
                trust_remote_code=options.measure.trust_remote_code,
            )  # fmt: skip
            result = replace(result, verification=report)
        result, stopped = _score(ref, table, options, folder, result, progress)
        result = replace(result, seconds=round(time.monotonic() - started, 1))
        _describe(ref, table, options, folder, result)
    _clear_work(out)
    if stopped is not None:
        again = f"optiq score {ref.source} {out} --uniform 4,5,6 -o {out}/{SCORE_FILE}"
        verified = "complete and verified" if options.verify else "complete"
        stopped.add_note(f"{out} is {verified} but not scored; `{again}` does that")
        raise stopped
    if options.upload_repo:
        upload_folder(out, options.upload_repo, progress=progress)
    return result


def expand_bit_map(table: SensitivityTable, allocation: Allocation) -> BitMap:
    """The bit map with every path of every unit (fused and shared modules) named."""
    chosen = allocation.bit_map.choices
    return BitMap(
        choices={path: chosen.get(path, chosen[unit.path]) for unit in table.units for path in unit.paths}
    )


def _check(ref: ModelRef, options: ConvertOptions, out: Path, names: Collection[str]) -> _Checked:
    """Everything that can be known to fail before the long work."""
    require_absent(out)
    check_given(options, names)
    if options.upload_repo:
        check_upload(options.upload_repo)
    reference = open_source(ref, options)
    given = read_table(Path(options.sensitivity), reference) if options.sensitivity else None
    if given is not None:
        options = match_correction(given, options, names)
        given = restrict_candidates(given, options.measure, names)
    allocation = _allocate(given or outline_table(reference, options.measure), options, reference)
    check_disk_space(out.absolute().parent, allocation.nbytes)
    if _level(options) != "none":
        _rewrite_windows(reference, options)
    return _Checked(reference, given, options)


def _allocate(table: SensitivityTable, options: ConvertOptions, reference: Reference) -> Allocation:
    if options.allocation:
        return given_allocation(Path(options.allocation), table)
    kv = None
    if options.allocate.fit:
        kv = kv_bytes_per_token(reference.config, options.allocate.context, float_bits=table.float_bits)
    return allocate(table, options.allocate, kv_bytes_per_token=kv)


def _level(options: ConvertOptions) -> Level:
    """How the rounding is corrected; the static method promises to run nothing."""
    return "none" if options.measure.method == "static" else options.measure.correction


def _rewrite_windows(reference: Reference, options: ConvertOptions) -> Windows:
    measure = options.measure
    return load_windows(
        reference.tokenizer(), source=measure.calibration, split="calibration",
        num_tokens=max(_REWRITE_TOKENS, measure.num_tokens), window=measure.window,
    )  # fmt: skip


def _write(
    reference: Reference, table: SensitivityTable, bit_map: BitMap, options: ConvertOptions, folder: Path,
    progress: ProgressSink,
) -> list[str]:  # fmt: skip
    """Rewrite the model into ``folder``; returns paths that could not be corrected."""
    level = _level(options)
    tokens = mx.array(_rewrite_windows(reference, options).tokens) if level != "none" else None
    writer = CheckpointWriter(folder, max_shard_bytes=int(options.max_shard_gb * 1e9))
    rewriter = Rewriter(
        reference, bit_map, level=level, dtype=reference.stored_dtype, columns=table.column_importance,
        writer=writer,
    )  # fmt: skip
    rewriter.run(tokens, progress)
    keep_vision = "vision_tower" in getattr(reference.model, "model", {})
    writer.finish(
        reference.config,
        bit_map,
        tokenizer=reference.tokenizer(),
        source=Path(reference.ref.path),
        keep_vision_config=keep_vision,
    )
    return rewriter.fallbacks


def _table_notes(table: SensitivityTable, options: ConvertOptions) -> tuple[str, ...]:
    """How the measurement and the rounding differ."""
    level = _level(options)
    notes = calibration_notes(table, options.measure) if level != "none" else ()
    if table.method in ("static", "published") or table.correction == level:
        return notes
    return (
        *notes,
        f"measured with correction {table.correction}, written with {level}; the prediction is for the first",
    )


def _fallback_notes(fallbacks: list[str]) -> tuple[str, ...]:
    if not fallbacks:
        return ()
    more = f" and {len(fallbacks) - 3} more" if len(fallbacks) > 3 else ""
    return (f"rounded without correction, no inputs were seen: {', '.join(fallbacks[:3])}{more}",)


def _score(
    ref: ModelRef, table: SensitivityTable, options: ConvertOptions, folder: Path, result: ConversionResult,
    progress: ProgressSink,
) -> tuple[ConversionResult, KeyboardInterrupt | None]:  # fmt: skip
    """Score on held-out text; being stopped here is handed back, since the checkpoint is complete."""
    if not options.score:
        return result, None
    stopped = None
    try:
        report, notes = score_conversion(
            ref, ModelRef(path=str(folder), source=Path(result.out).name), result.allocation, progress,
            trust_remote_code=options.measure.trust_remote_code, has_prediction=table.method != "static",
        )  # fmt: skip
    except KeyboardInterrupt as error:
        stopped, report, notes = error, None, ("not scored: stopped by the user",)
    return replace(result, score=report, notes=(*result.notes, *notes)), stopped


def _describe(
    ref: ModelRef, table: SensitivityTable, options: ConvertOptions, folder: Path, result: ConversionResult
) -> None:
    """Write optiq/sensitivity.json, optiq/metadata.json and the model card."""
    encoded = encode_sensitivity(table)
    write_sensitivity(folder / "optiq" / "sensitivity.json", table)
    metadata = CheckpointMetadata(
        package_version=__version__,
        base_model=ref.source,
        base_revision=ref.revision,
        model=table.model,
        method=table.method,
        reference=table.reference,
        calibration=table.calibration,
        sensitivity_sha256=hashlib.sha256(encoded).hexdigest(),
        allocation=result.allocation,
        measured=measured_divergence(result.score) if result.score else None,
        verification=result.verification,
        values_rotated=result.values_rotated,
        command=command_line(ref, options, Path(result.out)),
        seconds=result.seconds,
        notes=result.notes,
    )
    write_metadata(folder, metadata)
    name = options.upload_repo or Path(result.out).name
    card = card_text(folder, name, read_card(Path(ref.path)), metadata, table, result.score)
    write_bytes_atomic(folder / "README.md", card.encode())


def _clear_work(out: Path) -> None:
    work = work_folder(out)
    discard_journal(work / _JOURNAL)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()
