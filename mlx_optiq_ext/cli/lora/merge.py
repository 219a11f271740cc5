"""Add adapters of one base up into one adapter, exactly.

An ADAPTER is a folder or a Hub id. Each may have a weight, as in style=0.5; without one it is 1. Ranks add
up: nothing is approximated.
"""

import argparse
import math
from contextlib import suppress
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import atomic_folder, require_absent
from mlx_optiq_ext.hub.adapters import resolve_adapter
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
    parser.add_argument(
        "adapters", metavar="ADAPTER[=WEIGHT]", nargs="+", help="Folders or Hub ids, with weights."
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to write; must not exist.")


def run(args: argparse.Namespace) -> int:
    """Read, add up, write."""
    console = Console.from_args(args)
    parts = [parse_part(text) for text in args.adapters]
    out = Path(args.out)
    require_absent(out)
    folders = [resolve_adapter(source) for source, _ in parts]
    with atomic_folder(out) as working:
        adapters = [
            (read_adapter(folder), weight) for folder, (_, weight) in zip(folders, parts, strict=True)
        ]
        merged = merge_adapters(adapters, [source for source, _ in parts])
        write_adapter(working, merged)
    result = MergeResult(
        adapter=str(out),
        parts=dict(parts),
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


def parse_part(text: str) -> tuple[str, float]:
    """Read ``ADAPTER`` or ``ADAPTER=WEIGHT``; a folder that exists under the whole name wins.

    Raises:
        UsageError: The weight is no finite number.
    """
    source, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    with suppress(ValueError):
        if math.isfinite(number := float(weight)):
            return source, number
    raise UsageError(f"{text!r}: {weight!r} is no weight; write ADAPTER=0.5")
