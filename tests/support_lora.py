"""Adapters on tiny models."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from support_models import LLAMA, quantize_by, tiny_model

from mlx_optiq_ext.lora.layers import adapted_modules, apply_lora
from mlx_optiq_ext.lora.ranks import plan_ranks
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.types.adapter import AdapterOptions, LoraTarget, RankMap
from mlx_optiq_ext.types.quant import (
    BitMap,
    CalibrationInfo,
    Choice,
    ModelFingerprint,
    Probe,
    SensitivityTable,
    Unit,
)

TOKENS = mx.array([[3, 17, 44, 9, 250, 31, 5, 7], [99, 2, 2, 61, 40, 77, 130, 8]])
ALL_TARGETS = "attention,mlp,experts,embeddings"
BASE = ModelFingerprint(model_type="llama", sha256="0" * 64, source="tiny")


def quantized_model(label: str, config: dict[str, Any] = LLAMA, seed: int = 0) -> nn.Module:
    """A float32 model with all that can be adapted stored as ``label``; ``keep`` quantizes nothing."""
    model = tiny_model(config, seed=seed, dtype=mx.float32)
    choice = Choice.parse(label)
    if choice.mode != "keep":
        paths = [target.path for target in list_targets(model)]
        quantize_by(model, BitMap(choices=dict.fromkeys(paths, choice)))
    return model


def adapt(model: nn.Module, ranks: dict[str, int] | int = 4, seed: int = 0, scale: float = 2.0) -> RankMap:
    """Give a model adapters that change its output; ``ranks`` by path, or one for all."""
    rank_map = plan_ranks(model, AdapterOptions(targets=ALL_TARGETS, rank_scaling="constant"))
    if isinstance(ranks, int):
        ranks = dict.fromkeys(rank_map.ranks, ranks)
    rank_map = RankMap(
        ranks={path: ranks.get(path, 0) for path in rank_map.ranks},
        targets=rank_map.targets,
        scaling="constant",
        rank=4,
    )
    apply_lora(model, rank_map, scale=scale, seed=seed)
    rng = np.random.default_rng(seed)
    for layer in adapted_modules(model).values():
        layer.lora_b = mx.array(0.05 * rng.standard_normal(layer.lora_b.shape).astype(np.float32))
    return rank_map


def uneven(model: nn.Module) -> dict[str, int]:
    """Different ranks, some of them 0."""
    return {target.path: k % 5 for k, target in enumerate(list_targets(model))}


def table_for(targets: tuple[LoraTarget, ...], harm: dict[str, float]) -> SensitivityTable:
    """A sensitivity table with one probe per target."""
    choice = Choice.parse("4g64")
    return SensitivityTable(
        model=BASE,
        method="fisher",
        reference="resident",
        correction="none",
        calibration=CalibrationInfo(source="test", sha256="", num_tokens=1, num_windows=1, domains=()),
        domains=(),
        units=tuple(
            Unit(
                paths=(t.path,),
                shape=(t.outputs, t.inputs),
                numel=t.inputs * t.outputs,
                kind="linear",
                choices=(choice,),
            )
            for t in targets
        ),
        probes=tuple(
            Probe(path=t.path, choice=t.choice or choice, divergence=harm.get(t.path, 0.0)) for t in targets
        ),
        total_numel=1,
        fixed_bits=0,
    )
