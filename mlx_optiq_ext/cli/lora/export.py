"""Write an adapter in another form: PEFT's, plain mlx-lm's, or ours.

ADAPTER is a folder or a Hub id, in any form that is read, so `--to optiq` imports a PEFT adapter. PEFT takes
ranks and scales per module as they are; plain mlx-lm gets one rank, the largest, padded with zeros.
"""

import argparse
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.formats.adapter import AdapterForm, find_adapter
from mlx_optiq_ext.formats.atomic import atomic_folder
from mlx_optiq_ext.hub.adapters import resolve_adapter
from mlx_optiq_ext.lora.files import read_adapter, write_adapter
from mlx_optiq_ext.lora.peft import write_peft

__all__ = ["ExportResult", "add_arguments", "run"]


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    adapter: str
    read_as: AdapterForm
    written_as: AdapterForm
    files: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq lora export``."""
    parser.add_argument("adapter", metavar="ADAPTER", help="Hub repository or folder of the adapter.")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to write; must not exist.")
    parser.add_argument(
        "--to",
        choices=["peft", "mlx-lm", "optiq"],
        default="peft",
        help="peft: for transformers, vLLM and others; mlx-lm: nothing of ours in it; optiq: ranks as they "
        "are, and the padded form beside them. (default: peft)",
    )


def run(args: argparse.Namespace) -> int:
    """Read, write, show."""
    console = Console.from_args(args)
    source, out = resolve_adapter(args.adapter), Path(args.out)
    form = find_adapter(source).form
    with atomic_folder(out) as working:
        adapter = read_adapter(source)
        if args.to == "peft":
            write_peft(working, adapter)
        else:
            write_adapter(working, adapter, plain=args.to == "mlx-lm")
        files = tuple(sorted(str(path.relative_to(working)) for path in working.rglob("*") if path.is_file()))
    result = ExportResult(adapter=str(out), read_as=form, written_as=args.to, files=files)
    console.result(result, f"{out}: {', '.join(files)}")
    return 0
