"""Choose how to store a model's KV cache: bits per layer, keys and values apart.

MODEL is the checkpoint that will be served, quantized or not. Measures how much the output changes when each
layer's keys or values get fewer bits, spends the budget of stored bits exactly, and accepts a per-layer
storage only where it beats the best uniform pair on held-out text. Writes kv_config.json, which
`mlx_lm.generate --kv-config` and our server take, and kv_sensitivity.json, which serves every other budget:
the same command with another --target-bits measures nothing again.
"""

import argparse
from pathlib import Path

import msgspec

from mlx_optiq_ext.allocate.size import format_nbytes, head_room_nbytes, left_for_cache, parse_nbytes
from mlx_optiq_ext.cli.commands.report import terminal_text
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.convert.kv_cache import plan_cache
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent_file
from mlx_optiq_ext.formats.kv_config import KV_CONFIG_FILE, write_kv_config
from mlx_optiq_ext.formats.kv_sensitivity import (
    KV_SENSITIVITY_FILE,
    kv_sensitivity_sha256,
    read_kv_sensitivity,
    write_kv_sensitivity,
)
from mlx_optiq_ext.formats.safetensors import read_folder
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.kv.report import UNBOUNDED, build_cache_report, context_that_fits
from mlx_optiq_ext.patches.registry import activate
from mlx_optiq_ext.types.kv import KVConfig, KVSensitivity
from mlx_optiq_ext.types.options import KVCacheOptions

__all__ = ["KVCacheResult", "add_arguments", "run"]


class KVCacheResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    config: KVConfig
    config_file: str
    sensitivity_file: str
    fitting_context: int | None = None
    """Tokens that fit into ``--fit``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq kv-cache``."""
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder of the checkpoint to serve.")
    parser.add_argument(
        "-o", "--out", metavar="DIR", default=".", help="Folder for kv_config.json and kv_sensitivity.json."
    )
    parser.add_argument(
        "--force", action="store_true", help="Replace a kv_config.json that is already there."
    )
    add_options(parser, KVCacheOptions)


def run(args: argparse.Namespace) -> int:
    """Measure (unless that is done), allocate, compare, write, show."""
    console = Console.from_args(args)
    options = options_from(args, KVCacheOptions)
    memory = parse_nbytes(options.fit, flag="--fit") if options.fit else None
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out} is a file; name the folder to write into")
    config_file, table_file = out / KV_CONFIG_FILE, out / KV_SENSITIVITY_FILE
    require_absent_file(config_file, force=args.force)
    ref = resolve_model(
        args.model, options.revision, progress=console.progress, trust_remote_code=options.trust_remote_code
    )
    if memory is not None:
        # Before any long work, from the files; below it is what the loaded model takes.
        left_for_cache(memory, sum(tensor.nbytes for tensor in read_folder(Path(ref.path)).values()))
    known = _measured_before(table_file)
    activate("mlx_lm.models.base")

    def keep(table: KVSensitivity) -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_kv_sensitivity(table_file, table)

    plan = plan_cache(ref, options, known=known, on_table=keep, progress=console.progress)
    if plan.reused:
        console.note(f"{table_file} was measured with the same settings: nothing is measured again")
    keep(plan.table)
    config = msgspec.structs.replace(plan.config, sensitivity_sha256=kv_sensitivity_sha256(plan.table))
    write_kv_config(config_file, config)
    facts: tuple[tuple[str, str], ...] = ()
    fitting = None
    if memory is not None:
        room = head_room_nbytes(memory)
        left = left_for_cache(memory, plan.weights_nbytes)
        fitting = context_that_fits(config, plan.table.sites, left)
        facts = (
            (
                f"fits into {options.fit}",
                f"{_tokens(fitting)}, with {format_nbytes(plan.weights_nbytes)} of weights and "
                f"{format_nbytes(room)} head room{_beyond(fitting, plan.positions)}",
            ),
        )
    console.note(f"wrote {config_file} and {table_file}")
    report = build_cache_report(
        Path(ref.path).name if ref.is_local else ref.source, config, plan.table, facts
    )
    result = KVCacheResult(
        config=config,
        config_file=str(config_file),
        sensitivity_file=str(table_file),
        fitting_context=fitting,
    )
    console.result(result, terminal_text(report, is_terminal=console.out.isatty()))
    return 0


def _tokens(fitting: int) -> str:
    """A context in words."""
    return "any context" if fitting >= UNBOUNDED else f"{fitting:,} tokens"


def _beyond(fitting: int, positions: int | None) -> str:
    """That the model was not made for so many tokens; empty where it was."""
    if positions is None or fitting <= positions:
        return ""
    return f"; the model's config names {positions:,} positions"


def _measured_before(file: Path) -> KVSensitivity | None:
    """An earlier measurement in the output folder; its settings are compared before it is used."""
    if not file.is_file():
        return None
    try:
        return read_kv_sensitivity(file)
    except UsageError:
        return None
