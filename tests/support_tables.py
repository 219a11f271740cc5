"""Plausible sensitivity tables, allocations and score records for tests of everything that draws them."""

import math
import random
from itertools import pairwise
from typing import Any

from mlx_optiq_ext.types.metadata import CheckpointMetadata
from mlx_optiq_ext.types.quant import (
    Allocation,
    BitMap,
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Pin,
    Probe,
    SensitivityTable,
    Unit,
    UnitKind,
)
from mlx_optiq_ext.types.score import ScoreReport, ScoreRow

CHOICES = tuple(Choice(bits=b, group_size=64) for b in (2, 3, 4, 5, 6, 8))
DOMAINS = ("prose", "code", "math", "chat")
CALIBRATION = CalibrationInfo(
    source="built-in", sha256="ab" * 32, num_tokens=1024, num_windows=8, domains=DOMAINS
)
HELD_OUT = CalibrationInfo(
    source="built-in", sha256="cd" * 32, num_tokens=2048, num_windows=16, domains=DOMAINS
)

DENSE = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
MOE = (
    *DENSE[:4],
    "mlp.gate",
    *(f"mlp.switch_mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")),
    *(f"mlp.shared_expert.{p}" for p in ("gate_proj", "up_proj", "down_proj")),
)


def make_table(
    blocks: int = 30, modules: tuple[str, ...] = DENSE, width: int = 576, seed: int = 7
) -> SensitivityTable:
    """Table of a decoder with a tied embedding: a bit is worth a factor 4.3, roles and blocks differ."""
    rng = random.Random(seed)
    units = [Unit(paths=("model.embed_tokens",), shape=(49152, width), numel=49152 * width, kind="embedding")]
    for block in range(blocks):
        for module in modules:
            numel = width * width * (8 if "switch" in module else 3 if "mlp" in module else 1)
            kind: UnitKind = (
                "experts" if "switch" in module else "router" if module == "mlp.gate" else "linear"
            )
            path = f"model.layers.{block}.{module}"
            units.append(
                Unit(
                    paths=(path,),
                    shape=(width, numel // width),
                    numel=numel,
                    kind=kind,
                    block=block,
                    module=module,
                )
            )
    probes = [probe for unit in units for probe in _probes(unit, blocks, rng)]
    return SensitivityTable(
        model=ModelFingerprint(
            model_type="llama", sha256="12" * 32, source="example/base-135m", revision="abc123"
        ),
        method="fisher",
        reference="resident",
        correction="fast",
        calibration=CALIBRATION,
        domains=DOMAINS,
        units=tuple(units),
        probes=tuple(probes),
        total_numel=sum(u.numel for u in units) + blocks * 2 * width,
        fixed_bits=blocks * 2 * width * 16,
        forward_equivalents=7.5,
    )


def make_allocation(table: SensitivityTable, target: float = 5.0) -> Allocation:
    """A greedy allocation within ``target``: good enough to draw."""
    divergence = {(p.path, p.choice): p.divergence for p in table.probes}
    picked = {unit.path: CHOICES[1] for unit in table.units}
    budget = target * table.total_numel - table.fixed_bits
    spent = sum(picked[u.path].stored_bits(u.numel) for u in table.units)
    steps = [
        (
            (divergence[u.path, low] - divergence[u.path, high])
            / (high.stored_bits(u.numel) - low.stored_bits(u.numel)),
            u,
            high,
            high.stored_bits(u.numel) - low.stored_bits(u.numel),
        )
        for u in table.units
        for low, high in pairwise(CHOICES[1:])
    ]
    for _, unit, choice, cost in sorted(steps, key=lambda step: -step[0]):
        if spent + cost <= budget and choice > picked[unit.path]:
            picked[unit.path] = choice
            spent += cost
    bits = spent + table.fixed_bits
    return Allocation(
        bit_map=BitMap(choices={path: picked[u.path] for u in table.units for path in u.paths}),
        target_bpw=target,
        achieved_bpw=bits / table.total_numel,
        nbytes=bits // 8,
        predicted_divergence=sum(divergence[path, choice] for path, choice in picked.items()),
        predicted_stderr=0.004,
        pins=(
            Pin(
                path="model.embed_tokens",
                choice=picked["model.embed_tokens"],
                reason="asked for",
                cost_bits=4096,
            ),
        ),
        uniform=tuple((c.label, c.bpw(), sum(divergence[u.path, c] for u in table.units)) for c in CHOICES),
        worst_domain="math",
        worst_domain_divergence=0.21,
        correction="fast",
    )


def make_score() -> ScoreReport:
    """Reference, this model and three uniform ones."""
    rows = [
        ("reference", "reference", 16.0, 0.0, 1.0, 12.31),
        ("this model", "candidate", 4.997, 0.135, 0.872, 13.5),
    ]
    rows += [
        ("uniform 4g64", "uniform", 4.5, 0.72, 0.701, 21.4),
        ("uniform 5g64", "uniform", 5.5, 0.178, 0.848, 14.1),
        ("uniform 6g64", "uniform", 6.5, 0.055, 0.921, 12.7),
    ]
    return ScoreReport(
        reference="example/base-135m",
        held_out=HELD_OUT,
        window=128,
        rows=tuple(
            ScoreRow(
                label=label,
                role=role,  # type: ignore[arg-type]
                bpw=bpw,
                nbytes=int(bpw * 134_515_008 / 8),
                divergence=divergence,
                divergence_stderr=divergence * 0.04,
                divergence_half_width=1.96 * divergence * 0.04,
                top1=top1,
                top1_stderr=0.006,
                top1_half_width=1.96 * 0.006,
                perplexity=perplexity,
                perplexity_stderr=0.41,
                perplexity_half_width=1.96 * 0.41,
                by_domain={d: divergence * s for d, s in zip(DOMAINS, (0.8, 1.0, 1.4, 0.8), strict=True)},
                against_first=divergence / 0.135 if role == "uniform" else None,
                against_first_interval=(divergence / 0.144, divergence / 0.126)
                if role == "uniform"
                else None,
            )
            for label, role, bpw, divergence, top1, perplexity in rows
        ),
    )


def curve_points(table: SensitivityTable, targets: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """(bpw, divergence) of :func:`make_allocation` at every target."""
    made = [make_allocation(table, target) for target in targets]
    return tuple((a.achieved_bpw, a.predicted_divergence) for a in made)


def _probes(unit: Unit, blocks: int, rng: random.Random) -> list[Probe]:
    base = 2e-3 * math.exp(rng.gauss(0, 0.7)) * unit.numel / 1e6
    if unit.module.endswith(("v_proj", "down_proj")):
        base *= 4
    if unit.block is not None:
        base *= 1 + 3 * math.exp(-unit.block / 2) + 1.5 * math.exp((unit.block - blocks + 1) / 2)
    divergences = [base * 4.3 ** (4 - c.bits) for c in CHOICES]
    return [
        Probe(path=unit.path, choice=c, divergence=d, stderr=d / 10, by_domain=(d * 0.8, d, d * 1.4, d * 0.8))
        for c, d in zip(CHOICES, divergences, strict=True)
    ]


def make_metadata(table: SensitivityTable, **others: Any) -> CheckpointMetadata:
    """Record of a conversion by a table; ``others`` are further fields, or replace these."""
    fields: dict[str, Any] = {
        "package_version": "1.0",
        "base_model": "example/base-135m",
        "base_revision": "abcdef",
        "model": table.model,
        "method": "fisher",
        "reference": "resident",
        "calibration": table.calibration,
        "allocation": make_allocation(table),
    }
    return CheckpointMetadata(**(fields | others))
