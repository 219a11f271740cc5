"""Flags of the command modules, from option Structs (:mod:`mlx_optiq_ext.formats.arguments`)."""

from mlx_optiq_ext.formats.arguments import add_options, given_options, options_from

__all__ = ["add_options", "given_options", "options_from"]
