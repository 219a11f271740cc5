"""A measured KV cache → tables and a heat map of K/V × layers for people.

Knows neither MLX nor colours. Called by ``optiq kv-cache`` and ``optiq report``.
"""

import math

from msgspec.structs import replace

from mlx_optiq_ext.kv.allocate import Extent, stored_bits
from mlx_optiq_ext.types.figures import FEWEST_WINDOWS, divergence_text, number_text
from mlx_optiq_ext.types.kv import (
    KVConfig,
    KVLayer,
    KVProbe,
    KVScore,
    KVSensitivity,
    KVSite,
    KVTensor,
    cache_name,
    cached_numbers,
    sliding_slack,
)
from mlx_optiq_ext.types.quant import Choice
from mlx_optiq_ext.types.report import HeatCell, HeatMap, Report, TextTable

__all__ = ["UNBOUNDED", "build_cache_report", "context_that_fits", "full_bytes_per_token"]

UNBOUNDED = 1 << 40
"""Tokens of context that nothing limits."""

_ROWS: tuple[tuple[KVTensor, str], ...] = (("k", "keys"), ("v", "values"))
_COMMON_BITS = 4
_FULL_BITS = 16


def build_cache_report(
    title: str, config: KVConfig, table: KVSensitivity | None, facts: tuple[tuple[str, str], ...] = ()
) -> Report:
    """Gather what is known of a cache.

    Args:
        title: Name of the model.
        config: The accepted configuration.
        table: What was measured; None where only the configuration is at hand.
        facts: Further facts, behind ours.
    """
    return Report(
        title=f"{title}: KV cache",
        facts=(*_facts(config, table), *facts),
        comparison=_comparison(table) if table is not None and table.scores else None,
        heat_map=_heat_map(config, table),
        notes=(*config.notes, *(f"cache {name}: {why}" for name, why in _refused(table))),
    )


def full_bytes_per_token(sites: tuple[KVSite, ...], context: int) -> float:
    """Bytes per token of the same cache in 16 bits."""
    return cached_numbers(sites, context) * _FULL_BITS / 8 / context


def context_that_fits(config: KVConfig, sites: tuple[KVSite, ...], left: int) -> int:
    """Tokens of context whose cache stays within ``left`` bytes.

    Args:
        config: How the cache is stored.
        sites: The caches.
        left: Bytes that weights and head room leave: ``allocate.size.left_for_cache``.
    Returns:
        Tokens; :data:`UNBOUNDED` where every cache slides, so that any context fits.
    """
    low, high = 0, 1
    while _nbytes(config, sites, high) <= left and high < UNBOUNDED:
        low, high = high, high * 2
    if high >= UNBOUNDED:
        return UNBOUNDED
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _nbytes(config, sites, middle) <= left else (low, middle)
    return low


def _nbytes(config: KVConfig, sites: tuple[KVSite, ...], context: int) -> int:
    """What the buffers of ``context`` tokens take: sliding ones hold more than their window."""
    roomy = tuple(
        site if site.window is None else replace(site, window=site.window + sliding_slack(site.window))
        for site in sites
    )
    return math.ceil(
        stored_bits(roomy, _choices(config, sites), Extent(context, config.recent, config.first)) / 8
    )


def _choices(config: KVConfig, sites: tuple[KVSite, ...]) -> dict[tuple[str, KVTensor], Choice]:
    named = {(layer.index, layer.member): layer for layer in config.layers}
    found: dict[tuple[str, KVTensor], Choice] = {}
    for site in sites:
        layer = named.get((site.index, site.member)) or KVLayer(index=site.index)
        found[site.name, "k"], found[site.name, "v"] = layer.k, layer.v
    return found


def _facts(config: KVConfig, table: KVSensitivity | None) -> tuple[tuple[str, str], ...]:
    found = [
        ("accepted", config.chosen),
        ("stored bits per number", f"{config.bits_per_number:.3f}"),
        ("bytes per token", f"{config.bytes_per_token:,.0f} at {config.context:,} tokens, 16-bit scales"),
    ]
    if table is not None and config.bytes_per_token:
        full = full_bytes_per_token(table.sites, config.context)
        found.append(
            ("in 16 bits", f"{full:,.0f} bytes per token, {full / config.bytes_per_token:.2f} times as many")
        )
    if table is not None and table.calibration is not None:
        lengths = ", ".join(f"{length:,}" for length in table.lengths)
        found.append(("measured on", f"{table.calibration.source}, prefixes of {lengths} tokens"))
    how = "keys centred, keys and values rotated" if config.rotate else "neither centred nor rotated"
    found.append(("storage", how))
    if config.recent or config.first:
        found.append(("in full precision besides", f"first {config.first}, last {config.recent} tokens"))
    return tuple((name, value) for name, value in found if value)


def _comparison(table: KVSensitivity) -> TextTable:
    """Candidates on held-out text, best first."""
    rows = [_score_row(score) for score in table.scores]
    lengths = tuple(f"at {length:,}" for length in table.lengths)
    return TextTable(
        title="Whole caches on held-out text: KL from the full-precision cache, nats per token",
        columns=("storage", "bits", "KL", *lengths, "same top token"),
        rows=tuple(rows),
        highlight=next((k for k, score in enumerate(table.scores) if score.accepted), None),
        note=" ".join(_score_remarks(table)),
    )


def _score_row(score: KVScore) -> tuple[str, ...]:
    return (
        score.label,
        f"{score.bits_per_number:.3f}",
        divergence_text(score.divergence, score.half_width, score.num_windows),
        *(number_text(value) for value in score.by_length),
        f"{score.top1:.1%}",
    )


def _score_remarks(table: KVSensitivity) -> tuple[str, ...]:
    count = table.scores[0].num_windows
    enough = count >= FEWEST_WINDOWS
    return (
        f"± is a 95 % interval over {count} windows." if enough else f"± n/a: only {count} windows.",
        *(("Uniform pairs are centred and rotated alike.",) if table.rotate else ()),
        "Storages that were clearly worse on half of the windows are left out.",
    )


def _heat_map(config: KVConfig, table: KVSensitivity | None) -> HeatMap:
    layers = {(layer.index, layer.member): layer for layer in config.layers}
    probes = table.probes if table is not None else ()
    common = _common_choice(probes)
    cells = []
    for position, ((index, member), layer) in enumerate(layers.items()):
        mine = [p for p in probes if (p.index, p.member) == (index, member)]
        site = _site(table, layer)
        for row, (tensor, name) in enumerate(_ROWS):
            choice = layer.k if tensor == "k" else layer.v
            found = {probe.choice: probe.divergence for probe in mine if probe.tensor == tensor}
            cells.append(
                HeatCell(
                    path=f"cache {cache_name(index, member)} {name}",
                    row=row,
                    block=position,
                    numel=site.numel(tensor) if site else 0,
                    bits=choice.bits,
                    choice=choice.label,
                    sensitivity=found.get(common) if common else None,
                    divergence=found.get(choice),
                )
            )
    return HeatMap(
        modules=tuple(name for _, name in _ROWS),
        labels=tuple(name for _, name in _ROWS),
        blocks=tuple(range(len(layers))),
        cells=tuple(cells),
        probe=common.label if common else "",
    )


def _site(table: KVSensitivity | None, layer: KVLayer) -> KVSite | None:
    sites = table.sites if table is not None else ()
    return next((s for s in sites if (s.index, s.member) == (layer.index, layer.member)), None)


def _common_choice(probes: tuple[KVProbe, ...]) -> Choice | None:
    """The choice that most tensors were measured at, near four bits."""
    counts: dict[Choice, int] = {}
    for probe in probes:
        if probe.choice.mode == "affine":
            counts[probe.choice] = counts.get(probe.choice, 0) + 1
    order = sorted(counts, key=lambda c: (-counts[c], abs(c.bits - _COMMON_BITS), -c.group_size))
    return order[0] if order else None


def _refused(table: KVSensitivity | None) -> tuple[tuple[str, str], ...]:
    return table.refused if table is not None else ()
