"""Compare checkpoints with their reference on held-out text.

Prints one table: true stored bits, divergence with its interval, ratio to the first checkpoint, agreement,
perplexity. `--uniform 4,5,6` adds the reference quantized uniformly, as stock mlx-lm would. Written to
optiq/score.json of the first checkpoint, the scores enter its metadata and its model card too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.convert.rescore import is_own_record, record_score
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.eval.score import parse_uniform, score
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent_file, write_bytes_atomic
from mlx_optiq_ext.formats.score import encode_score
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.quant.report import comparison_table
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import ScoreOptions
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``optiq score``."""
    parser.add_argument("reference", metavar="REF", help="The unquantized model: Hub id or folder.")
    parser.add_argument(
        "candidates", metavar="CAND", nargs="*", help="Checkpoints of it: Hub ids or folders."
    )
    parser.add_argument("--revision", default=None, help="Hub revision of REF (branch, tag or commit).")
    parser.add_argument(
        "-o", "--out", default=None, metavar="FILE", help="Also write the scores to this JSON file."
    )
    parser.add_argument(
        "--force", action="store_true", help="Replace a file of scores that is already there."
    )
    add_options(parser, ScoreOptions)


def run(args: argparse.Namespace) -> int:
    """Score and print the table."""
    console = Console.from_args(args)
    options = options_from(args, ScoreOptions)
    if not args.candidates and not parse_uniform(options.uniform):
        raise UsageError("nothing to score: name a checkpoint or give --uniform 4,5,6")
    if args.out is not None:
        require_absent_file(Path(args.out), force=args.force)
    trust = options.trust_remote_code
    reference = resolve_model(
        args.reference, args.revision, progress=console.progress, trust_remote_code=trust
    )
    candidates = [
        resolve_model(source, None, progress=console.progress, trust_remote_code=trust)
        for source in args.candidates
    ]
    report = score(reference, candidates, options, console.progress)
    if args.out is not None:
        _write(Path(args.out), candidates, report, console)
    notes = [f"note: {note}" for note in report.notes]
    if console.json_output:
        for note in notes:
            console.note(note)
    table = comparison_table(report)
    text = format_table(table.columns, table.rows, title=table.title)
    console.result(report, "\n".join((text, table.note, *notes)))
    return 0


def _write(file: Path, candidates: Sequence[ModelRef], report: ScoreReport, console: Console) -> None:
    """Write the scores; into a checkpoint's own record with all that speaks of them there."""
    if not candidates or not is_own_record(file, Path(candidates[0].path)):
        write_bytes_atomic(file, encode_score(report))
        return
    for note in record_score(Path(candidates[0].path), report):
        console.note(f"note: {note}")
