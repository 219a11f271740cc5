"""Offer quantize, score, report, status and adapters to agents over MCP.

Speaks the Model Context Protocol on stdin and stdout: an agent starts this command itself. For Claude Code:
`claude mcp add optiq -- optiq mcp`. Long work runs as jobs that the agent asks about; what still runs when
the agent leaves is stopped, and goes on when it is asked for again.
"""

import argparse

from mlx_optiq_ext import __version__
from mlx_optiq_ext.cli.running import add_address_arguments, ask_server
from mlx_optiq_ext.errors import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq mcp``."""
    add_address_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve one agent until it closes stdin."""
    try:
        from mlx_optiq_integrations.mcp_server import make_mcp_server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("mcp", "mcp_types", "pydantic"):
            raise UsageError(f"`optiq mcp` needs {error.name}: pip install 'mlx-optiq-ext[mcp]'") from error
        raise

    def ask(method: str, path: str, body: object) -> object:
        return ask_server(args, method, path, body)

    make_mcp_server(ask, __version__).run("stdio")
    return 0
