"""Convert a model to a mixed-precision MLX checkpoint.

MODEL is a Hugging Face repository or a folder with unquantized weights. Measures, allocates within the
target, corrects the rounding, writes, verifies with stock mlx-lm and scores on held-out text. What is
written is an ordinary MLX checkpoint. A stopped conversion goes on where it was when the same command is
given again.
"""

import argparse
import shlex
from pathlib import Path

from msgspec.structs import replace

from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.cli.commands.report import terminal_text
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.convert.card import has_chat_template
from mlx_optiq_ext.convert.model import ConversionResult, convert_model
from mlx_optiq_ext.formats.arguments import add_options, given_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.options import ConvertOptions
from mlx_optiq_ext.types.verify import VerifyReport
from mlx_optiq_integrations.usage import snippets_text, usage_snippets

__all__ = ["add_arguments", "render", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq convert``."""
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder.")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to make.")
    add_options(parser, ConvertOptions)


def run(args: argparse.Namespace) -> int:
    """Convert, and show what came out."""
    console = Console.from_args(args)
    options = options_from(args, ConvertOptions)
    out = Path(args.out)
    require_absent(out)
    ref = resolve_model(
        args.model, options.measure.revision, progress=console.progress,
        trust_remote_code=options.measure.trust_remote_code,
    )  # fmt: skip
    result = convert_model(
        ref, options, out, progress=console.progress, given=given_options(args, ConvertOptions)
    )
    if console.json_output:
        for note in result.notes:
            console.note(f"note: {note}")
    console.result(result, "" if console.json_output else render(result, is_terminal=console.out.isatty()))
    return 0


def render(result: ConversionResult, *, is_terminal: bool) -> str:
    """What came out, for people: bits, comparison, heat map, verification, cost, and how to run it."""
    out = Path(result.out)
    table = read_sensitivity(out)
    report = build_report(out.name, table=table, allocation=result.allocation, score=result.score)
    report = replace(report, notes=tuple(dict.fromkeys((*result.notes, *report.notes))))
    usage = snippets_text(usage_snippets(result.out, is_chat=has_chat_template(out)))
    return "\n\n".join(
        (
            terminal_text(report, is_terminal=is_terminal),
            "\n".join((_verification(result.verification), _cost(result), f"Written to {result.out}")),
            usage,
            f"All pictures: optiq report {shlex.quote(result.out)} --format html --out report.html",
        )
    )


def _verification(report: VerifyReport | None) -> str:
    if report is None:
        return "Not verified (--no-verify)"
    return (
        f"Verified: {report.num_paths} modules and {report.num_tensors} tensors are as planned in "
        f"config.json, on disk and in stock mlx-lm {report.mlx_lm}, which loads it without this "
        f"package ({report.forward})"
    )


def _cost(result: ConversionResult) -> str:
    minutes, seconds = divmod(round(result.seconds), 60)
    spent = f"{minutes} min {seconds} s" if minutes else f"{result.seconds:.1f} s"
    passes = f", {result.forward_equivalents:.3g} forward passes" if result.forward_equivalents else ""
    return (
        f"{format_nbytes(result.allocation.nbytes)} of weights in {spent}{passes}; "
        f"arrays took at most {format_nbytes(result.peak_nbytes)} of memory"
    )
