"""Add adapters of one base up into one adapter, exactly.

Each DIR may have a weight, as in style=0.5; without one it is 1. Ranks add up: nothing is approximated.
"""

import argparse
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import atomic_folder
from mlx_optiq_ext.lora.files import read_adapter, write_adapter
from mlx_optiq_ext.lora.merge import merge_adapters

__all__ = ["MergeResult", "add_arguments", "parse_part", "run"]


class MergeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    adapter: str
    parts: dict[str, float]
    num_modules: int
    max_rank: int
    num_parameters: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq lora merge``."""
    parser.add_argument("adapters", metavar="DIR[=WEIGHT]", nargs="+", help="Adapter folders with weights.")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to write; must not exist.")


def run(args: argparse.Namespace) -> int:
    """Read, add up, write."""
    console = Console.from_args(args)
    parts = [parse_part(text) for text in args.adapters]
    out = Path(args.out)
    with atomic_folder(out) as working:
        adapters = [(read_adapter(folder), weight) for folder, weight in parts]
        merged = merge_adapters(adapters, [str(folder) for folder, _ in parts])
        write_adapter(working, merged)
    result = MergeResult(
        adapter=str(out),
        parts={str(folder): weight for folder, weight in parts},
        num_modules=len(merged.factors),
        max_rank=merged.config.max_rank,
        num_parameters=sum(factors.num_parameters for factors in merged.factors.values()),
    )
    text = (
        f"{out}: {len(parts)} adapters in one, ranks up to {result.max_rank} in {result.num_modules} "
        f"modules, {result.num_parameters:,} parameters"
    )
    console.result(result, text)
    return 0


def parse_part(text: str) -> tuple[Path, float]:
    """Read ``DIR`` or ``DIR=WEIGHT``; a folder that exists under the whole name wins.

    Raises:
        UsageError: The weight is no number.
    """
    folder, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(weight)
    except ValueError:
        raise UsageError(f"{text!r}: {weight!r} is no weight; write DIR=0.5") from None
