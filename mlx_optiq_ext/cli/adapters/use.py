"""Choose the adapter that answers where a request names none (`base`: the model itself)."""

import argparse

from mlx_optiq_ext.cli.adapters.list import adapters_text
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.running import add_server_arguments, ask_server, path_of

__all__ = ["add_arguments", "run"]

_BASE = "base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq adapters use``."""
    parser.add_argument("name", metavar="NAME", help="A mounted adapter, a sum a+b, or base.")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Choose and show."""
    console = Console.from_args(args)
    body = {"name": None if args.name == _BASE else args.name, "model": args.model}
    answer = ask_server(args, "POST", path_of("v1", "adapters", "use"), body)
    console.result(answer, adapters_text(answer["data"]))
    return 0
