"""Take an adapter off a running server; answers that use it go on to their end."""

import argparse

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.running import add_server_arguments, ask_server, path_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq adapters unmount``."""
    parser.add_argument("name", metavar="NAME", help="As it was mounted.")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Unmount and say so."""
    console = Console.from_args(args)
    answer = ask_server(args, "DELETE", path_of("v1", "adapters", args.name, model=args.model))
    console.result(answer, f"{args.name} is unmounted")
    return 0
