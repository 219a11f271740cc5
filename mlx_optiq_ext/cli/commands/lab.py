"""Open the dashboard of a running server: another name of `optiq tui`."""

from mlx_optiq_ext.cli.commands.tui import add_arguments, run

__all__ = ["add_arguments", "run"]
