"""List the adapters that a running server has mounted."""

import argparse
from typing import Any

from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.cli.running import add_server_arguments, ask_server, path_of
from mlx_optiq_ext.types.nbytes import format_nbytes

__all__ = ["adapters_text", "add_arguments", "run"]

_BASE = {True: "yes", False: "other weights", None: "not said"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq adapters list``."""
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Ask and show."""
    console = Console.from_args(args)
    answer = ask_server(args, "GET", path_of("v1", "adapters"))
    if args.model:
        answer = {**answer, "data": [each for each in answer["data"] if each["model"] == args.model]}
    console.result(answer, adapters_text(answer["data"]))
    return 0


def adapters_text(adapters: list[dict[str, Any]]) -> str:
    """A table of adapters, or that there are none."""
    if not adapters:
        return "no adapter is mounted"
    rows = [
        (
            each["name"] + (" (default)" if each["is_default"] else ""),
            each["model"],
            each["source"],
            str(each["rank"]),
            format_nbytes(each["nbytes"]),
            _BASE[each["fits_base"]],
            str(each["requests"]),
        )
        for each in adapters
    ]
    return format_table(("adapter", "model", "source", "rank", "memory", "fits base", "requests"), rows)
