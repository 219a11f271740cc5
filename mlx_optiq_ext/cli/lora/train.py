"""Train an adapter for a model, quantized or not, on your own examples.

DATA is a folder with train.jsonl (and valid.jsonl, test.jsonl), one JSONL file, or the Hub id of a data set.
A line is {"messages": […], "tools": […]}, {"prompt": …, "completion": …} or {"text": …}; for --method dpo
{"prompt": …, "chosen": …, "rejected": …}. The rank of every module is shown before training. Ctrl-C or
SIGTERM saves a checkpoint; the same command goes on from it to the same result. OUT is an adapter that our
server and stock mlx-lm load, with metrics.jsonl and loss.svg.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.commands.report import terminal_text
from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.prepare import TrainJob
from mlx_optiq_ext.lora.preview import preview_training
from mlx_optiq_ext.lora.report import rank_report
from mlx_optiq_ext.lora.train import train_adapter
from mlx_optiq_ext.progress_line import format_duration
from mlx_optiq_ext.types.adapter import AdapterOptions, RankMap
from mlx_optiq_ext.types.training import CURVE_FILE, METRICS_FILE, TrainOptions, TrainPreview, TrainSummary

__all__ = ["PreviewResult", "TrainResult", "add_arguments", "run"]


class TrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    adapter: str
    """Folder."""
    ranks: RankMap
    summary: TrainSummary
    notes: tuple[str, ...]


class PreviewResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--dry-run --json`` prints."""

    adapter: str
    """Folder that it would be written to."""
    ranks: RankMap
    preview: TrainPreview
    notes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq lora train``."""
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder of the base model.")
    parser.add_argument(
        "--data", metavar="DATA", required=True, help="Folder, JSONL file or Hub id of the examples."
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder for the adapter.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Check data, ranks and output, count, and train nothing."
    )
    parser.add_argument("--revision", default=None, help="Hub revision of MODEL (branch, tag or commit).")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Run Python code that comes with the model."
    )
    add_options(parser.add_argument_group("adapter"), AdapterOptions)
    add_options(parser.add_argument_group("training"), TrainOptions)


def run(args: argparse.Namespace) -> int:
    """Train, write, show."""
    console = Console.from_args(args)
    adapter, options = options_from(args, AdapterOptions), options_from(args, TrainOptions)
    base = resolve_model(
        args.model, args.revision, progress=console.progress, trust_remote_code=args.trust_remote_code
    )
    job = TrainJob(
        base=base,
        data=args.data,
        out=Path(args.out),
        options=options,
        adapter=adapter,
        trust_remote_code=args.trust_remote_code,
    )
    shown: list[RankMap] = []
    notes: list[str] = []

    title = f"Adapter of {Path(base.path).name if base.is_local else base.source}"

    def show_ranks(ranks: RankMap) -> None:
        shown.append(ranks)
        text = terminal_text(rank_report(title, ranks), is_terminal=sys.stderr.isatty())
        console.finding({"ranks": ranks.ranks}, text)

    def show_note(text: str) -> None:
        notes.append(text)
        console.note(f"note: {text}")

    if args.dry_run:
        preview = preview_training(job, on_ranks=show_ranks, on_note=show_note, progress=console.progress)
        planned = PreviewResult(adapter=str(job.out), ranks=shown[0], preview=preview, notes=tuple(notes))
        console.result(planned, _preview_text(preview))
        return 0
    summary = train_adapter(job, on_ranks=show_ranks, on_note=show_note, progress=console.progress)
    result = TrainResult(adapter=str(job.out), ranks=shown[0], summary=summary, notes=tuple(notes))
    console.result(result, _text(result))
    return 0


def _preview_text(preview: TrainPreview) -> str:
    """The numbers of a training that was not made, for people."""
    parts = [("training", preview.train), ("validation", preview.valid), ("test", preview.test)]
    rows = [
        (name, f"{part.examples:,}", f"{part.tokens:,}", f"{part.learnt_tokens:,}", f"{part.longest:,}")
        for name, part in parts
        if part.examples
    ]
    going_on = f", {preview.done_updates:,} of them done" if preview.done_updates else ""
    return "\n".join(
        (
            format_table(("data", "examples", "tokens", "learnt", "longest"), rows),
            "",
            f"{preview.updates:,} updates, {preview.updates_per_epoch:,} an epoch{going_on}; "
            f"{preview.num_parameters:,} parameters. Nothing was trained.",
        )
    )


def _text(result: TrainResult) -> str:
    """The result for people."""
    summary = result.summary
    rows = [
        ("updates", f"{summary.steps}{' (stopped early)' if summary.stopped_early else ''}"),
        ("kept", f"adapter of update {summary.kept_step}"),
    ]
    if summary.train_loss is not None:
        rows.append(("training loss", f"{summary.train_loss:.4f}"))
    first, best = summary.first_validation, summary.validation
    if first is not None and best is not None:
        rows.append(("validation loss", f"{first.loss:.4f} before, {best.loss:.4f} kept"))
        rows += [
            (name.replace("_", " "), f"{first.values[name]:.3f} before, {value:.3f} kept")
            for name, value in best.values.items()
        ]
    if summary.test_loss is not None:
        rows.append(("test loss", f"{summary.test_loss:.4f}"))
    speed = summary.num_tokens / summary.seconds if summary.seconds else 0.0
    rows += [
        ("tokens", f"{summary.num_tokens:,} in {format_duration(summary.seconds)}, {speed:,.0f} a second"),
        ("peak memory", f"{summary.peak_memory_nbytes / 1e9:.2f} GB"),
        ("adapter", f"{result.adapter} ({result.ranks.num_parameters:,} parameters)"),
        ("curve", str(Path(result.adapter) / CURVE_FILE)),
        ("metrics", str(Path(result.adapter) / METRICS_FILE)),
    ]
    return format_table(("training", ""), rows)
