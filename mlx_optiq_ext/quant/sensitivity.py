"""Measure a model: from a checkpoint to a sensitivity table that serves every budget.

Puts together the recorded forward pass, the Fisher statistics, the corrected weight errors and a few exact
probes. Restartable: finished units are in a journal and are not computed again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.measure.calibration import Windows, load_windows
from mlx_optiq_ext.measure.fisher import fisher_pass
from mlx_optiq_ext.measure.head import HeadStatistics
from mlx_optiq_ext.measure.statistics import ExpertStatistics, UnitStatistics
from mlx_optiq_ext.models.check import require_runnable
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.models.walk import get_module, total_numel
from mlx_optiq_ext.quant.correct import Level
from mlx_optiq_ext.quant.errors_of import Floats, divergence_of_choices, divergence_of_head_choices
from mlx_optiq_ext.quant.journal import Journal, journal_key
from mlx_optiq_ext.quant.probe import (
    Rounding,
    check_estimates,
    check_note,
    measured_probe,
    probe_every_choice,
    unit_gains,
)
from mlx_optiq_ext.quant.reference import Reference, open_reference, parse_candidates
from mlx_optiq_ext.quant.static import static_probes
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress
from mlx_optiq_ext.types.quant import KEEP, CalibrationInfo, Probe, ProbeCheck, SensitivityTable, Unit

__all__ = ["measure_sensitivity"]

_NO_CALIBRATION = CalibrationInfo(source="none", sha256="", num_tokens=0, num_windows=0, domains=())
_MIN_HITS = 16


class _Run(NamedTuple):
    """Everything one measurement works with."""

    reference: Reference
    options: MeasureOptions
    units: tuple[Unit, ...]
    windows: Windows
    tape: Tape
    journal: Journal
    progress: ProgressSink


def measure_sensitivity(
    ref: ModelRef,
    options: MeasureOptions,
    *,
    journal_file: Path | None = None,
    progress: ProgressSink = ignore_progress,
    reference: Reference | None = None,
) -> SensitivityTable:
    """Measure what every choice of every unit costs.

    Args:
        ref: The model, unquantized.
        options: See :class:`MeasureOptions`.
        journal_file: Where finished units are kept; with ``options.resume`` a journal of the same model,
            calibration, choices and code is continued. None keeps nothing.
        progress: Stages ``forward``, ``measure``, ``probe``.
        reference: The model where the caller has opened it already.
    Raises:
        ModelError: The model cannot be loaded or has nothing to quantize.
        MeasurementError: Non-finite values, or too little calibration text.
        UsageError: An option does not fit the model.
    Cost: per window one forward, and per label sample one recomputation and one backward pass; one
        correction of every tensor per choice; ``options.probes`` forward-equivalents of exact probes.
    """
    reference = reference or open_reference(ref, options)
    units = reference.units(parse_candidates(options))
    if options.method == "static":
        return _table(reference, options, units, _Found(static_probes(units), _NO_CALIBRATION, "none"))
    if options.method == "kl" and reference.how == "stream":
        raise UsageError("--method kl needs the model resident; use --method fisher, which streams")
    require_runnable(reference.model, gradients=options.method == "fisher")
    windows = load_windows(
        reference.tokenizer(),
        source=options.calibration,
        split="calibration",
        num_tokens=options.num_tokens,
        window=options.window,
    )
    key = journal_key(fingerprint(ref), windows, options, str(reference.stored_dtype), reference.edited)
    journal = Journal.open(journal_file, key, resume=options.resume)
    total = sum(len(unit.paths) for unit in units)
    announcement = journal.announcement(total)
    finished = journal.finished(options.probes)
    if finished is not None:
        progress(Progress(stage="measure", done=total, total=total, replayed=total, note=announcement))
        return finished
    tape = Tape(reference.model, mx.array(windows.tokens), reference.memory())
    num_blocks = len(tape.blocks)
    if announcement:
        progress(Progress(stage="forward", done=0, total=num_blocks, note=announcement))
    tape.forward(lambda done: progress(Progress(stage="forward", done=done, total=num_blocks)))
    run = _Run(reference, options, units, windows, tape, journal, progress)
    table = _table(run.reference, options, units, _sweep(run) if options.method == "kl" else _fisher(run))
    journal.finish(table, options.probes)
    return table


class _Found(NamedTuple):
    """What a method of measuring found."""

    probes: tuple[Probe, ...]
    calibration: CalibrationInfo
    correction: Level
    """How the measured errors were rounded."""
    cost: float = 0.0
    notes: tuple[str, ...] = ()
    columns: dict[str, tuple[float, ...]] = {}  # noqa: RUF012 - never changed
    check: ProbeCheck | None = None


def _sweep(run: _Run) -> _Found:
    """The published sweep: exact probes of everything, rounded plainly."""
    plain = Rounding(run.units, "none", run.reference.stored_dtype, {})
    probes, cost = probe_every_choice(run.tape, plain, run.windows, run.journal, run.progress)
    return _Found(probes, run.windows.info, "none", cost)


def _fisher(run: _Run) -> _Found:
    """Second-order estimates of everything, checked by a few exact probes."""
    options, reference = run.options, run.reference
    estimate = _estimate(run)
    probes, notes = estimate.probes, estimate.notes
    cost, check = 1.0 + 3.0 * options.label_samples, None
    if options.probes and reference.how == "resident":
        gains = unit_gains(run.units, run.journal)
        rounding = Rounding(run.units, options.correction, reference.stored_dtype, estimate.importance, gains)
        spent, check = check_estimates(run.tape, rounding, probes, run.windows, options.probes, run.progress)
        cost += spent
        notes += (check_note(check),) if check else ()
    elif options.probes:
        notes = (*notes, "no exact probes: the model was streamed")
    return _Found(probes, run.windows.info, options.correction, cost, notes, estimate.columns, check)


class _Estimate(NamedTuple):
    probes: tuple[Probe, ...]
    notes: tuple[str, ...]
    columns: dict[str, tuple[float, ...]]
    importance: dict[str, mx.array]


def _estimate(run: _Run) -> _Estimate:
    """Second-order estimates of every unit × choice."""
    by_path = {path: unit for unit in run.units for path in unit.paths}
    costs: dict[str, Floats] = dict(run.journal.costs)
    columns: dict[str, tuple[float, ...]] = {}
    coverage: list[str] = []
    importance: dict[str, mx.array] = {}
    lookups: dict[str, UnitStatistics] = {}
    done = replayed = 0

    def report(name: str) -> None:
        nonlocal done, replayed
        done, replayed = done + 1, replayed + (name in run.journal.resumed)
        total = len(by_path)
        run.progress(Progress(stage="measure", done=done, total=total, detail=name, replayed=replayed))

    for block in fisher_pass(run.tape, samples=run.options.label_samples, seed=run.options.seed):
        for path, statistics in block.units.items():
            unit = by_path[path]
            if statistics.by_gradient:
                columns[path] = tuple(float(v) for v in np.array(statistics.importance()))
            if block.block is None and unit.kind == "embedding":
                lookups[path] = statistics
                continue
            coverage += _coverage_notes(path, statistics)
            importance[path] = statistics.importance()
            mx.eval(importance[path])
            if path not in costs:
                weight = get_module(run.reference.model, path).weight
                costs[path], gain = divergence_of_choices(
                    weight, statistics, unit.choices,
                    level=run.options.correction, float_dtype=run.reference.stored_dtype,
                )  # fmt: skip
                run.journal.add(path, costs[path], gain)
            report(path)
        mx.clear_cache()
    importance |= _outside(run, lookups, costs, report)
    unseen = [path for path, unit in by_path.items() if path not in costs and unit.choices != (KEEP,)]
    notes = (
        *coverage,
        *(f"{path}: not run by the calibration text, kept as it is" for path in unseen),
    )
    return _Estimate(_probes(run, costs), notes, columns, importance)


def _outside(
    run: _Run,
    lookups: Mapping[str, UnitStatistics],
    costs: dict[str, Floats],
    report: Callable[[str], None],
) -> dict[str, mx.array]:
    """Embeddings and head, once everything else is measured: adds to ``costs``, returns the importance."""
    importance: dict[str, mx.array] = {}
    dtype, level = run.reference.stored_dtype, run.options.correction
    for unit in run.units:
        path = unit.path
        is_head = any(path in run.tape.heads for path in unit.paths) or run.tape.tied_head in unit.paths
        looked_up = next((lookups[path] for path in unit.paths if path in lookups), None)
        felt = HeadStatistics(run.tape) if is_head else looked_up
        if felt is None:
            continue
        importance[path] = felt.importance()
        mx.eval(importance[path])
        if path not in costs:
            weight = get_module(run.reference.model, path).weight
            if isinstance(felt, HeadStatistics):
                costs[path], gain = divergence_of_head_choices(
                    weight, felt, looked_up, unit.choices, level=level, float_dtype=dtype
                )
            else:
                costs[path], gain = divergence_of_choices(
                    weight, felt, unit.choices, level=level, float_dtype=dtype
                )
            run.journal.add(path, costs[path], gain)
        report(path)
    return importance


def _probes(run: _Run, costs: Mapping[str, Floats]) -> tuple[Probe, ...]:
    """Sum the costs of a unit's paths and average them over windows, per domain and in all."""
    num_windows = len(run.windows.domain_index)
    probes: list[Probe] = []
    for unit in run.units:
        found = [costs[path] for path in unit.paths if path in costs]
        if not found:
            continue
        total = np.sum(found, axis=0)
        total = np.broadcast_to(total, (total.shape[0], num_windows))
        probes += [
            measured_probe(unit.path, choice, values, run.windows, exact=False)
            for choice, values in zip(unit.choices, total, strict=True)
        ]
    return tuple(probes)


def _coverage_notes(path: str, statistics: UnitStatistics) -> list[str]:
    if not isinstance(statistics, ExpertStatistics):
        return []
    low = sum(1 for hits in statistics.hits if hits < _MIN_HITS)
    if not low:
        return []
    return [
        f"{path}: {low} of {len(statistics.hits)} experts saw under {_MIN_HITS} tokens; raise --num-tokens"
    ]


def _table(
    reference: Reference, options: MeasureOptions, units: tuple[Unit, ...], found: _Found
) -> SensitivityTable:
    """Assemble the table; a unit that nothing was measured of is kept as it is."""
    measured = {probe.path for probe in found.probes}
    kept = tuple(unit if unit.path in measured else replace(unit, choices=(KEEP,)) for unit in units)
    unmeasured = tuple(
        Probe(path=unit.path, choice=KEEP, divergence=0.0) for unit in kept if unit.path not in measured
    )
    float_bits = reference.stored_dtype.size * 8
    return SensitivityTable(
        model=fingerprint(reference.ref),
        method=options.method,
        reference="none" if options.method == "static" else reference.how,
        correction=found.correction,
        calibration=found.calibration,
        domains=found.calibration.domains,
        units=kept,
        probes=(*found.probes, *unmeasured),
        total_numel=total_numel(reference.model),
        fixed_bits=reference.fixed_bits(kept),
        float_bits=float_bits,
        notes=(*found.calibration.notes, *found.notes),
        forward_equivalents=found.cost,
        code_version=__version__,
        probe_check=found.check,
        column_importance=found.columns,
    )
