"""Say how a checkpoint was made: the command that makes it again, and the model card."""

import shlex
from pathlib import Path

import msgspec

from mlx_optiq_ext.convert.card import card_facts, has_chat_template
from mlx_optiq_ext.formats.arguments import option_names
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.hub.card import render_card
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import AllocateOptions, ConvertOptions, MeasureOptions
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_ext.types.score import ScoreReport

__all__ = ["command_line", "write_card"]


def command_line(ref: ModelRef, options: ConvertOptions, out: Path) -> str:
    """The ``optiq convert`` call with every option that differs from its default."""
    words = ["optiq", "convert", ref.source if not ref.is_local else Path(ref.path).name]
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
    return shlex.join([*words, "-o", out.name])


def write_card(
    folder: Path,
    name: str,
    ref: ModelRef,
    metadata: CheckpointMetadata,
    table: SensitivityTable | None,
    score: ScoreReport | None,
) -> None:
    """Write README.md, the model card, into the checkpoint.

    Args:
        folder: The checkpoint, which has its tokenizer files already.
        name: What readers will type to load it: folder or repository name.
        ref: The base model.
        metadata: How the checkpoint was made.
        table: Gives the share of weights per choice.
        score: Comparison on held-out text.
    """
    is_chat = has_chat_template(folder)
    facts = card_facts(name, ref, metadata, table=table, score=score, is_chat=is_chat)
    write_bytes_atomic(folder / "README.md", render_card(facts).encode())
