"""Add an adapter into the weights of its base and write an ordinary checkpoint.

MODEL is the base that the adapter was trained on. With --store same every module keeps its bits, group and
mode, with its rounding fitted to calibration text; what that adds is measured on held-out text. With --store
dense the adapted modules are stored unquantized and compute exactly what the adapter did.
"""

import argparse
from pathlib import Path

from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import require_absent, require_writable
from mlx_optiq_ext.hub.adapters import resolve_adapter
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.fuse_folder import FuseJob, FuseResult, fuse_folder
from mlx_optiq_ext.types.figures import number_text
from mlx_optiq_ext.types.nbytes import format_nbytes

__all__ = ["add_arguments", "fuse_text", "run"]

_MUCH = 0.3
"""Of the divergence that the adapter makes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq lora fuse``."""
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder of the base.")
    parser.add_argument("adapter", metavar="ADAPTER", help="Hub repository or folder of the adapter.")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to write; must not exist.")
    parser.add_argument(
        "--store",
        choices=["same", "dense"],
        default="same",
        help="same: the base's own bits; dense: adapted modules unquantized. (default: same)",
    )
    parser.add_argument(
        "--num-tokens",
        metavar="TOKENS",
        type=int,
        default=1024,
        help="Tokens to fit the rounding to, and to compare on; 0 does neither. (default: 1024)",
    )
    parser.add_argument("--revision", metavar="REVISION", help="Hub revision of the base.")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Run model code that comes with the checkpoint."
    )


def run(args: argparse.Namespace) -> int:
    """Fuse, compare, write, show."""
    console = Console.from_args(args)
    out = Path(args.out)
    if args.num_tokens < 0:
        raise UsageError(f"--num-tokens is {args.num_tokens}; use 0 or more")
    require_absent(out)
    require_writable(out)
    base = resolve_model(
        args.model, args.revision, progress=console.progress, trust_remote_code=args.trust_remote_code
    )
    job = FuseJob(
        base=base,
        adapter=resolve_adapter(args.adapter),
        out=out,
        store=args.store,
        num_tokens=args.num_tokens,
        trust_remote_code=args.trust_remote_code,
    )
    result = fuse_folder(job, console.progress)
    console.result(result, fuse_text(result))
    return 0


def fuse_text(result: FuseResult) -> str:
    """What was fused and what it changed, for people."""
    rows = [("modules", f"{result.num_modules} fused"), ("weights", format_nbytes(result.nbytes))]
    if result.change is not None and result.added is not None:
        spread = f" ± {number_text(1.96 * result.added_stderr)}" if result.num_windows > 1 else ""
        rows += [
            ("the adapter changes the base by", f"KL {number_text(result.change)}"),
            ("storing the sum adds", f"KL {number_text(result.added)}{spread}"),
            ("measured on", f"{result.num_windows} windows of held-out text, nats per token"),
        ]
    table = format_table((result.folder, ""), rows)
    if result.change is not None and result.added is not None and result.added > _MUCH * result.change:
        table += (
            "\nStoring the sum costs much of what the adapter does: fuse with --store dense, or keep the "
            "adapter apart and serve it (optiq serve --adapter)."
        )
    return table
