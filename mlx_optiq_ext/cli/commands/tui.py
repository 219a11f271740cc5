"""Open the dashboard of a running server, in the terminal or in a browser.

Shows speed, memory, caches and log; mounts adapters; talks, quantizes and fine-tunes; connects clients. It
speaks to the server over HTTP only, here or on another machine, and starts long work as processes of its own.
"""

import argparse
import os
import sys

from mlx_optiq_ext.cli.api_key import read_api_key
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.cli.running import add_address_arguments
from mlx_optiq_ext.errors import UsageError

__all__ = ["add_arguments", "run"]

_PORT = 8090
_PAGE_DRIVER = "TEXTUAL_DRIVER"
"""Set for a dashboard that runs behind a page, which is its terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq tui``."""
    add_address_arguments(parser)
    parser.add_argument(
        "--demo", action="store_true", help="Show a recording; no server and no model needed."
    )
    parser.add_argument("--screen", metavar="NAME", default="", help="Screen to open first, such as chat.")
    parser.add_argument(
        "--web", action="store_true", help="Show it in a browser of this machine, not in the terminal."
    )
    parser.add_argument("--port", type=int, default=_PORT, help=f"Of --web (default: {_PORT}).")


def run(args: argparse.Namespace) -> int:
    """Show the dashboard until it is left."""
    try:
        return _serve_page(args) if args.web else _show(args)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("textual", "textual_serve", "httpx", "aiohttp"):
            raise UsageError(
                f"the dashboard needs {error.name}; install it with `pip install 'mlx-optiq-ext[tui]'`"
            ) from error
        raise


def _show(args: argparse.Namespace) -> int:
    from mlx_optiq_tui.app import LabApp
    from mlx_optiq_tui.client import ServerClient
    from mlx_optiq_tui.demo.server import demo_client
    from mlx_optiq_tui.screens import installed_screens

    names = [entry.name for entry in installed_screens()]
    if args.screen and args.screen not in names:
        raise UsageError(f"no screen {args.screen!r}; screens are {', '.join(names)}")
    if not sys.stdout.isatty() and _PAGE_DRIVER not in os.environ:
        raise UsageError("the dashboard needs a terminal; --web shows it in a browser")
    if sys.stdout.isatty() and not all(os.get_terminal_size(sys.stdout.fileno())):
        raise UsageError("this terminal does not know its size; say it with `stty cols 120 rows 40`")
    client = demo_client() if args.demo else ServerClient(args.url, key=read_api_key(args.api_key_file))
    app = LabApp(client, is_demo=args.demo, first=args.screen)
    app.run()
    return app.return_code or 0


def _serve_page(args: argparse.Namespace) -> int:
    from mlx_optiq_tui.web.server import LabServer

    command = [sys.executable, "-m", "mlx_optiq_ext", "tui", "--url", args.url, "--screen", args.screen]
    command += ["--api-key-file", args.api_key_file] if args.api_key_file else []
    command += ["--demo"] if args.demo else []
    console = Console.from_args(args)

    def listening(url: str) -> None:
        console.result({"url": url}, f"the dashboard is at {url}")

    LabServer(command, args.port, listening).serve()
    return 0
