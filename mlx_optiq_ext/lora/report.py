"""Ranks of an adapter → tables and a heat map for people.

Knows neither MLX nor colours. Called by ``optiq lora train`` and ``optiq lora info``.
"""

from collections.abc import Mapping, Sequence

from mlx_optiq_ext.allocate.heat_map import block_and_role, order_modules, rank_heat_map, short_names
from mlx_optiq_ext.types.adapter import AdapterConfig, RankMap
from mlx_optiq_ext.types.figures import number_text
from mlx_optiq_ext.types.report import Report, TextTable

__all__ = ["adapter_report", "rank_report"]


def rank_report(title: str, ranks: RankMap) -> Report:
    """The ranks that a training will use, and why these."""
    parameters = {t.path: ranks.ranks[t.path] * t.parameters_per_rank for t in ranks.targets}
    facts = [
        ("rank scaling", f"{ranks.scaling} at rank {ranks.rank}"),
        ("parameters", _parameters(ranks.num_parameters, ranks.max_parameters)),
        ("adapted", f"{len(ranks.adapted)} of {len(ranks.targets)} modules"),
    ]
    total = sum(ranks.sensitivities.get(t.path, 0.0) for t in ranks.targets)
    if ranks.gains and total:
        removed = sum(ranks.gains.values()) / total
        facts.append(("estimated error within reach", f"{removed:.0%} of {number_text(total)} nats/token"))
    return Report(
        title=title,
        facts=tuple(facts),
        bits=_table(
            ranks.ranks, parameters, ranks.sensitivities, "KL of its bits" if ranks.gains else "KL at 4 bits"
        ),
        heat_map=rank_heat_map(ranks.ranks),
        notes=ranks.notes,
    )


def adapter_report(
    title: str, config: AdapterConfig, parameters: Mapping[str, int], facts: Sequence[tuple[str, str]] = ()
) -> Report:
    """A stored adapter.

    Args:
        title: Its name.
        config: What it says of itself.
        parameters: Per path.
        facts: Further facts, behind ours.
    """
    own = f", {len(config.scales)} modules with one of their own" if config.scales else ""
    base = config.base.source or "unnamed" if config.base is not None else "not said"
    training = config.training
    found = [
        ("base", base if config.base is None or config.base.sha256 else f"{base} (by name alone)"),
        ("parameters", _parameters(sum(parameters.values()), None)),
        ("ranks", f"{min(config.ranks.values())} to {config.max_rank} in {len(config.ranks)} modules"),
        ("rank scaling", config.rank_scaling or ""),
        ("scale", f"{config.scale:g}{own}"),
        ("made by", training.method),
        ("data", training.data),
        ("validation loss", "" if training.validation_loss is None else f"{training.validation_loss:.4f}"),
        *facts,
    ]
    return Report(
        title=title,
        facts=tuple((name, value) for name, value in found if value),
        bits=_table(config.ranks, parameters, {}, ""),
        heat_map=rank_heat_map(config.ranks),
        notes=training.notes,
    )


def _parameters(count: int, ceiling: int | None) -> str:
    return f"{count:,}" if ceiling is None else f"{count:,}, at most {ceiling:,}"


def _table(
    ranks: Mapping[str, int],
    parameters: Mapping[str, int],
    sensitivities: Mapping[str, float],
    divergence: str,
) -> TextTable:
    """One row per role."""
    places = {path: block_and_role(path) for path in ranks}
    roles = order_modules([role for _, role in places.values()])
    rows = []
    for role, name in zip(roles, short_names(roles), strict=True):
        paths = [path for path, (_, own) in places.items() if own == role]
        own = [ranks[path] for path in paths]
        row = [name, str(len(paths)), str(min(own)), f"{sum(own) / len(own):.1f}", str(max(own))]
        row.append(f"{sum(parameters[path] for path in paths):,}")
        if sensitivities:
            row.append(number_text(sum(sensitivities.get(path, 0.0) for path in paths)))
        rows.append(tuple(row))
    last = (divergence,) if sensitivities else ()
    return TextTable(
        title="Ranks by module",
        columns=("module", "count", "least", "mean", "most", "parameters", *last),
        rows=tuple(rows),
        note=f"{divergence}: divergence that quantizing the module causes, nats/token." if last else "",
    )
