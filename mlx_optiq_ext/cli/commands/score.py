"""Compare checkpoints with their reference on held-out text.

Prints one table: true stored bits, divergence with its interval, ratio to the first checkpoint, agreement,
perplexity. `--uniform 4,5,6` adds the reference quantized uniformly, as stock mlx-lm would. Written to
optiq/score.json of the first checkpoint, the scores enter its metadata and its model card too.

With `--kv-config FILE` it compares KV caches instead: REF, and every CAND, with the full-precision cache and
with the stored one, by context length; `--kv-uniform` adds plain uniform ones, `--needle` hidden facts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.convert.rescore import is_own_record, record_score
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.eval.kv_compare import compare_caches
from mlx_optiq_ext.eval.score import parse_uniform, score
from mlx_optiq_ext.formats.arguments import add_options, given_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent_file, write_bytes_atomic
from mlx_optiq_ext.formats.score import encode_score
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.kv.score_tables import cache_tables, needle_tables
from mlx_optiq_ext.patches.registry import activate
from mlx_optiq_ext.quant.report import comparison_table
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import KVScoreOptions, ScoreOptions
from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_ext.types.score import SCORE_FILE, ScoreReport
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.table import draw_table, wrapped

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
    add_options(parser, KVScoreOptions)


def run(args: argparse.Namespace) -> int:
    """Score and print the table."""
    console = Console.from_args(args)
    options, kv = options_from(args, ScoreOptions), options_from(args, KVScoreOptions)
    compares_caches = _compares_caches(args, options, kv)
    if not compares_caches and not args.candidates and not parse_uniform(options.uniform):
        raise UsageError(
            "nothing to score: name a checkpoint or give --uniform 4,5,6, or --kv-config FILE for KV caches"
        )
    if args.out is not None:
        require_absent_file(Path(args.out), force=args.force)
        if compares_caches and Path(args.out).as_posix().endswith(SCORE_FILE):
            raise UsageError(f"-o {args.out} is a checkpoint's own record of its weights; name another file")
    trust = options.trust_remote_code
    reference = resolve_model(
        args.reference, args.revision, progress=console.progress, trust_remote_code=trust
    )
    candidates = [
        resolve_model(source, None, progress=console.progress, trust_remote_code=trust)
        for source in args.candidates
    ]
    if compares_caches:
        return _run_kv(args, reference, candidates, options, kv)
    report = score(reference, candidates, options, console.progress)
    if args.out is not None:
        _write(Path(args.out), candidates, report, console)
    notes = [f"note: {note}" for note in report.notes]
    if console.json_output:
        for note in notes:
            console.note(note)
    console.result(report, _text((comparison_table(report),), notes))
    return 0


def _text(tables: Sequence[TextTable], notes: Sequence[str]) -> str:
    """Tables and notes in 80 columns."""
    style = Style(width=80)
    drawn = "\n\n".join(draw_table(table, style) for table in tables)
    return "\n".join((drawn, *(line for note in notes for line in wrapped(note, style.width, "  "))))


def _compares_caches(args: argparse.Namespace, options: ScoreOptions, kv: KVScoreOptions) -> bool:
    """Whether KV caches are what is compared; refuses options that would be without effect."""
    if kv.kv_config is not None or kv.kv_uniform.strip():
        without_effect = [
            f"--{name}" for name in ("uniform", "window") if name in given_options(args, type(options))
        ]
        if without_effect:
            raise UsageError(
                f"{', '.join(without_effect)} is about weights, --kv-config and --kv-uniform about caches; "
                "run optiq score twice"
            )
        return True
    alone = [f"--{name.replace('_', '-')}" for name in given_options(args, KVScoreOptions)]
    if alone:
        raise UsageError(f"{', '.join(alone)} needs a KV cache to compare: give --kv-config or --kv-uniform")
    return False


def _run_kv(
    args: argparse.Namespace,
    reference: ModelRef,
    candidates: Sequence[ModelRef],
    options: ScoreOptions,
    kv: KVScoreOptions,
) -> int:
    """Compare KV caches and print the tables."""
    console = Console.from_args(args)
    activate("mlx_lm.models.base")
    report = compare_caches(reference, candidates, options, kv, console.progress)
    if args.out is not None:
        write_bytes_atomic(Path(args.out), encode_score(report))
    notes = [f"note: {note}" for note in report.notes]
    if console.json_output:
        for note in notes:
            console.note(note)
    console.result(report, _text((*cache_tables(report), *needle_tables(report.needles)), notes))
    return 0


def _write(file: Path, candidates: Sequence[ModelRef], report: ScoreReport, console: Console) -> None:
    """Write the scores; into a checkpoint's own record with all that speaks of them there."""
    if not candidates or not is_own_record(file, Path(candidates[0].path)):
        write_bytes_atomic(file, encode_score(report))
        return
    for note in record_score(Path(candidates[0].path), report):
        console.note(f"note: {note}")
