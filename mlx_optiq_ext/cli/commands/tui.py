"""Open the dashboard of a running server in the terminal.

Shows speed, memory, caches and log; mounts adapters; talks, quantizes and fine-tunes; connects clients. It
speaks to the server over HTTP only, here or on another machine, and starts long work as processes of its own.
"""

import argparse
import sys

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.running import add_address_arguments
from mlx_optiq_ext.errors import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq tui``."""
    add_address_arguments(parser)
    parser.add_argument("--screen", metavar="NAME", default="", help="Screen to open first, such as chat.")


def run(args: argparse.Namespace) -> int:
    """Show the dashboard until it is left."""
    try:
        from mlx_optiq_tui.app import LabApp
        from mlx_optiq_tui.client import ServerClient
        from mlx_optiq_tui.screens import installed_screens
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the dashboard needs {error.name}; install it with `pip install 'mlx-optiq-ext[tui]'`"
        ) from error
    names = [entry.name for entry in installed_screens()]
    if args.screen and args.screen not in names:
        raise UsageError(f"no screen {args.screen!r}; screens are {', '.join(names)}")
    if not sys.stdout.isatty():
        raise UsageError("the dashboard needs a terminal")
    app = LabApp(ServerClient(args.url, key=read_api_key(args.api_key_file)), first=args.screen)
    app.run()
    return app.return_code or 0
