"""Mount an adapter on a running server, while it answers.

SOURCE is a folder below one of the server's --adapters-dir, or a Hub id.
"""

import argparse

from mlx_optiq_ext.cli.adapters.list import adapters_text
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.running import add_server_arguments, ask_server, path_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq adapters mount``."""
    parser.add_argument("name", metavar="NAME", help="What requests will call it.")
    parser.add_argument("source", metavar="SOURCE", help="Folder as the server sees it, or a Hub id.")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Mount and show."""
    console = Console.from_args(args)
    body = {"name": args.name, "source": args.source, "model": args.model}
    mounted = ask_server(args, "POST", path_of("v1", "adapters"), body)
    console.result(mounted, adapters_text([mounted]))
    return 0
