"""A finished conversion → the facts of its model card."""

from pathlib import Path

from mlx_optiq_ext.hub.card import CardFacts, License
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.figures import plus_minus
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_ext.types.score import ScoreReport
from mlx_optiq_integrations.usage import snippets_markdown, usage_snippets

__all__ = ["card_facts", "has_chat_template"]

_NO_LICENSE = License()


def card_facts(
    name: str,
    metadata: CheckpointMetadata,
    *,
    license: License = _NO_LICENSE,
    table: SensitivityTable | None = None,
    score: ScoreReport | None = None,
    is_chat: bool = True,
) -> CardFacts:
    """Gather what the card of a checkpoint says.

    Args:
        name: Folder or repository name of the checkpoint, as readers will type it.
        metadata: How the checkpoint was made.
        license: Licence of the base model.
        table: Gives the share of weights per choice.
        score: Comparison on held-out text.
        is_chat: Whether the checkpoint has a chat template.
    """
    report = build_report(name, table=table, allocation=metadata.allocation, score=score)
    base = metadata.base_model
    return CardFacts(
        name=name,
        base_model=base if metadata.base_revision else Path(base).name or base,
        base_revision=metadata.base_revision,
        license=license,
        summary=(*report.facts, *(_measured(metadata) if score is None else ())),
        comparison=report.comparison,
        domains=report.domains,
        bits=report.bits,
        pins=report.pins,
        calibration_sha256=metadata.calibration.sha256,
        held_out_sha256=score.held_out.sha256 if score else "",
        command=metadata.command,
        package_version=metadata.package_version,
        usage=snippets_markdown(usage_snippets(name, is_chat=is_chat)),
        notes=tuple(dict.fromkeys((*metadata.notes, *report.notes))),
    )


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer files hold a chat template."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")


def _measured(metadata: CheckpointMetadata) -> tuple[tuple[str, str], ...]:
    measured = metadata.measured
    if measured is None:
        return ()
    value = f"{plus_minus(measured.divergence, measured.half_width)} nats/token"
    return (("measured KL", f"{value} on {measured.held_out.num_tokens} held-out tokens"),)
