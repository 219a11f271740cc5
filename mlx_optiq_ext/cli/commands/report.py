"""Show how bits were spent: comparison table, bits-versus-divergence curve, heat maps.

DIR is a folder that `optiq convert` made, or a sensitivity file. The pictures are drawn in the terminal, or
written as one self-contained HTML page or one PNG. What is not there is named, with what would make it.
"""

import argparse
import os
import shutil
from pathlib import Path

import msgspec

from mlx_optiq_ext.allocate.bitmap import divergence_curve
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.metadata import find_metadata, read_metadata
from mlx_optiq_ext.formats.score import read_score
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.metadata import PublishedMetadata
from mlx_optiq_ext.types.options import ReportOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_ext.types.report import CurvePoint, Report
from mlx_optiq_ext.types.score import SCORE_FILE
from mlx_optiq_tui.ansi import Style, detect_colors
from mlx_optiq_tui.report import draw_report

__all__ = ["WrittenReport", "add_arguments", "load_report", "predicted_curve", "run", "terminal_text"]

_CURVE_POINTS = 24


class WrittenReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was written where."""

    path: str
    format: str
    nbytes: int
    missing: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq report``."""
    parser.add_argument("folder", metavar="DIR", help="Converted folder, or a sensitivity file.")
    add_options(parser, ReportOptions)


def run(args: argparse.Namespace) -> int:
    """Draw the report and say where it is."""
    console = Console.from_args(args)
    options = options_from(args, ReportOptions)
    if options.format == "terminal" and options.out is not None:
        raise UsageError("--out needs --format html or png; the terminal report goes to stdout")
    report = load_report(Path(args.folder))
    if options.format == "terminal":
        console.result(report, terminal_text(report, is_terminal=console.out.isatty()))
        return 0
    if options.format == "html":
        from mlx_optiq_ext.quant.report_html import render_html  # deferred: the terminal needs no pictures

        data = render_html(report).encode()
    else:
        from mlx_optiq_ext.quant.report_png import render_png  # deferred: as above

        data = render_png(report)
    out = Path(options.out or f"{report.title}-report.{options.format}")
    write_bytes_atomic(out, data)
    written = WrittenReport(path=str(out), format=options.format, nbytes=len(data), missing=report.missing)
    text = "\n".join([f"wrote {out} ({len(data) / 1e3:.0f} kB)", *(f"missing: {m}" for m in report.missing)])
    console.result(written, text)
    return 0


def load_report(path: Path) -> Report:
    """Read what a folder or a sensitivity file has, and gather the report.

    Args:
        path: Converted folder (``optiq/metadata.json``, ``optiq/sensitivity.json``, ``optiq/score.json``,
            each of which may be absent), or a sensitivity file.
    Raises:
        UsageError: Nothing to show, or a file that cannot be understood.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a folder made by optiq convert, or a sensitivity file")
    if path.is_file():
        return _table_report(path, read_sensitivity(path))
    missing = []
    allocation, notes = _allocation(path)
    if allocation is None:
        missing.append("bits chosen: no optiq/metadata.json; optiq convert writes it")
    table_file = _sensitivity_file(path)
    table = read_sensitivity(table_file) if table_file else None
    if table is None:
        missing.append("sensitivity and predicted curve: no optiq/sensitivity.json; optiq measure makes one")
    score = read_score(path / SCORE_FILE) if (path / SCORE_FILE).is_file() else None
    if score is None:
        made_by = f"optiq score REFERENCE {path.name} --uniform 4,5,6 -o {path.name}/{SCORE_FILE}"
        missing.append(f"comparison: no {SCORE_FILE}; make it with {made_by}")
    if allocation is None and table is None and score is None:
        raise UsageError(
            f"{path} has none of optiq/metadata.json, optiq/sensitivity.json, {SCORE_FILE}; "
            "give a folder made by optiq convert, or a sensitivity file"
        )
    report = build_report(
        path.resolve().name,
        table=table,
        allocation=allocation,
        score=score,
        predicted=predicted_curve(table) if table else (),
        missing=missing,
    )
    return msgspec.structs.replace(report, notes=tuple(dict.fromkeys((*notes, *report.notes))))


def predicted_curve(table: SensitivityTable) -> tuple[CurvePoint, ...]:
    """Best allocations from all units at their cheapest to all at their widest quantized choice."""
    numel = {unit.path: unit.numel for unit in table.units}
    stored: dict[str, list[int]] = {}
    for probe in table.probes:
        if probe.choice.mode != "keep":
            bits = probe.choice.stored_bits(numel[probe.path], table.float_bits)
            stored.setdefault(probe.path, []).append(bits)
    low, high = (
        (table.fixed_bits + sum(pick(bits) for bits in stored.values())) / table.total_numel
        for pick in (min, max)
    )
    targets = [low + (high - low) * i / (_CURVE_POINTS - 1) + 1e-4 for i in range(_CURVE_POINTS)]
    points = dict(divergence_curve(table, targets))
    return tuple(CurvePoint(bpw=bpw, divergence=points[bpw]) for bpw in sorted(points))


def terminal_text(report: Report, *, is_terminal: bool) -> str:
    """The report for stdout, with the colours and the width that the terminal has.

    Args:
        report: What to show.
        is_terminal: Whether stdout is a terminal; elsewhere it is 80 columns without colour.
    """
    width = shutil.get_terminal_size((80, 24)).columns if is_terminal else 80
    colors = detect_colors(os.environ, is_terminal=is_terminal)
    return draw_report(report, Style(colors=colors, width=min(max(width, 60), 140)))


def _table_report(path: Path, table: SensitivityTable) -> Report:
    file = path.resolve()
    name = file.parent.parent.name if file.parent.name == "optiq" else file.stem
    missing = ("bits chosen and comparison: this is a sensitivity file alone; give the converted folder",)
    return build_report(name, table=table, predicted=predicted_curve(table), missing=missing)


def _sensitivity_file(folder: Path) -> Path | None:
    names = ("optiq/sensitivity.json", "sensitivity.json", "sensitivity_checkpoint.json")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _allocation(folder: Path) -> tuple[Allocation | None, tuple[str, ...]]:
    """The chosen bit map and the notes on it, from our metadata or the published forms."""
    if find_metadata(folder) is None:
        return None, ()
    metadata = read_metadata(folder)
    if not isinstance(metadata, PublishedMetadata):
        return metadata.allocation, metadata.notes
    allocation = Allocation(
        bit_map=metadata.bit_map,
        target_bpw=metadata.target_bpw or 0.0,
        achieved_bpw=0.0,
        nbytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        predicted_divergence=0.0,
        solver="published",
    )
    return allocation, ()
