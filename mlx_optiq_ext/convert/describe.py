"""Say how a checkpoint was made: the command that makes it again, and the model card."""

import shlex
from pathlib import Path

import msgspec

from mlx_optiq_ext.convert.card import card_facts, has_chat_template
from mlx_optiq_ext.formats.arguments import option_names
from mlx_optiq_ext.hub.card import license_of_card, render_card
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["card_text", "command_line", "read_card"]


def command_line(ref: ModelRef, options: ConvertOptions, out: Path) -> str:
    """The ``optiq convert`` call, quoted for a shell, with every option that differs from its default.

    Args:
        ref: The base model; a folder stands as it was given.
        options: What was asked for.
        out: The folder that was made, as it was given.
    """
    words = ["optiq", "convert", ref.source]
    flat: dict[str, tuple[object, object]] = {}
    for part, default in (
        (options.measure, MeasureOptions()),
        (options.allocate, AllocateOptions()),
        (options, ConvertOptions()),
    ):
        for name, value in msgspec.structs.asdict(part).items():
            if name not in {"measure", "allocate", "upload_repo", "resume"}:
                flat[name] = (value, getattr(default, name))
    known = option_names(ConvertOptions)
    for name, (value, default_value) in flat.items():
        if value == default_value or name not in known:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [flag, str(item)]
    if ref.revision and not ref.is_local and options.measure.revision is None:
        words += ["--revision", ref.revision]
    return shlex.join([*words, "-o", str(out)])


def card_text(
    folder: Path,
    name: str,
    readme: str,
    metadata: CheckpointMetadata,
    table: SensitivityTable | None,
    score: ScoreReport | None,
) -> str:
    """The model card, README.md, of a checkpoint.

    Args:
        folder: The checkpoint, which has its tokenizer files already.
        name: What readers will type to load it: folder or repository name.
        readme: Card that states the licence: the base model's, or an older one of this checkpoint.
        metadata: How the checkpoint was made.
        table: Gives the share of weights per choice.
        score: Comparison on held-out text.
    Returns:
        Markdown; the same for the same arguments.
    """
    facts = card_facts(
        name,
        metadata,
        license=license_of_card(readme),
        table=table,
        score=score,
        is_chat=has_chat_template(folder),
    )
    return render_card(facts)


def read_card(folder: Path) -> str:
    """README.md of a model or checkpoint; empty where there is none."""
    file = folder / "README.md"
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
