"""A finished conversion → the facts of its model card."""

from pathlib import Path

from mlx_optiq_ext.hub.card import CardFacts, license_of_card
from mlx_optiq_ext.quant.report import build_report
from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_ext.types.score import ScoreReport
from mlx_optiq_integrations.usage import snippets_markdown, usage_snippets

__all__ = ["card_facts", "has_chat_template"]


def card_facts(
    name: str,
    ref: ModelRef,
    metadata: CheckpointMetadata,
    *,
    table: SensitivityTable | None = None,
    score: ScoreReport | None = None,
    is_chat: bool = True,
) -> CardFacts:
    """Gather what the card of a checkpoint says.

    Args:
        name: Folder or repository name of the checkpoint, as readers will type it.
        ref: The base model; its README.md, where it came along, states the licence.
        metadata: How the checkpoint was made.
        table: Gives the share of weights per choice.
        score: Comparison on held-out text.
        is_chat: Whether the checkpoint has a chat template.
    """
    report = build_report(name, table=table, allocation=metadata.allocation, score=score)
    readme = Path(ref.path) / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return CardFacts(
        name=name,
        base_model=metadata.base_model if not ref.is_local else Path(ref.path).name,
        base_revision=ref.revision,
        license=license_of_card(text),
        summary=(*report.facts, *_measured(metadata)),
        comparison=report.comparison,
        domains=report.domains,
        bits=report.bits,
        pins=report.pins,
        calibration_sha256=metadata.calibration.sha256,
        held_out_sha256=score.held_out.sha256 if score else "",
        command=metadata.command,
        package_version=metadata.package_version,
        usage=snippets_markdown(usage_snippets(name, is_chat=is_chat)),
        notes=metadata.notes,
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
    value = f"{measured.divergence:.4g} ± {measured.half_width:.2g} nats/token"
    text = f"{value} on {measured.held_out.num_tokens} held-out tokens"
    return (("measured KL", text),)
