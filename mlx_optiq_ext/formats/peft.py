"""PEFT's adapter folders: configuration, and names of tensors against module paths of mlx-lm.

PEFT stores A as (r, in) and B as (out, r), per expert where mlx-lm stacks experts. Knows names, not arrays.
Called by ``formats.adapter`` and ``lora.peft``. Source: PEFT's documented checkpoint format.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.formats.safetensors import read_header
from mlx_optiq_ext.types.adapter import AdapterConfig, TrainingFacts
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = ["PEFT_WEIGHTS_FILE", "PeftName", "hub_path", "parse_names", "peft_config", "read_peft_config"]

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight$")
_EXPERT = re.compile(r"^(.+)\.experts\.(\d+)\.(\w+)$")
_STACK = re.compile(r"^(.+)\.switch_mlp\.(\w+)$")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_UNTIED = (
    "low-rank factors of embeddings are not exchanged with PEFT: there they change lookups alone, in mlx-lm "
    "a tied output head too"
)


class _Peft(msgspec.Struct, frozen=True):
    """PEFT's keys that change the function; others are tolerated."""

    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None


class PeftName(NamedTuple):
    """One tensor of a PEFT file."""

    name: str
    path: str
    """In mlx-lm's tree, before the family's own prefix."""
    hub_path: str
    """In the tree that PEFT saw."""
    factor: str
    """``A`` or ``B``."""
    expert: int | None


def read_peft_config(folder: Path, document: Mapping[str, Any]) -> AdapterConfig:
    """What a PEFT folder says, as ours; ranks are those of the tensors.

    Raises:
        AdapterError: Not plain LoRA, or stored in a form that is not read.
    """
    where = folder / "adapter_config.json"
    try:
        peft = msgspec.convert(document, _Peft)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{where} is not a PEFT config: {error}") from error
    _refuse_other_kinds(peft, where)
    weights = folder / PEFT_WEIGHTS_FILE
    if not weights.is_file():
        remedy = (
            "save it as safetensors (save_pretrained does that)" if any(folder.glob("*.bin")) else "copy it"
        )
        raise AdapterError(f"{folder} has no {PEFT_WEIGHTS_FILE}; {remedy}")
    header = read_header(weights)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for entry in parse_names(header, str(weights)):
        if entry.factor != "A":
            continue
        rank, scale = header[entry.name].shape[0], _scale(peft, entry.hub_path, header[entry.name].shape[0])
        if scales.setdefault(entry.path, scale) != scale:
            raise AdapterError(
                f"{where}: the experts of {entry.path} have different scales (lora_alpha / r); "
                "train them with one rank"
            )
        ranks[entry.path] = max(rank, ranks.get(entry.path, 0))
    scale = _scale(peft, "", peft.r)
    source = peft.base_model_name_or_path
    return AdapterConfig(
        base=ModelFingerprint(model_type="", sha256="", source=source) if source else None,
        ranks=dict(sorted(ranks.items())),
        scale=scale,
        scales={path: own for path, own in sorted(scales.items()) if own != scale},
        dropout=peft.lora_dropout,
        training=TrainingFacts(method="peft"),
    )


def parse_names(names: Mapping[str, Any], where: str) -> tuple[PeftName, ...]:
    """Take the names of a file apart; mlx-lm's stacks of experts get one path.

    Raises:
        AdapterError: A tensor is no factor of a linear layer.
    """
    found = []
    for name in sorted(names):
        match = _FACTOR.match(name)
        if match is None or "lora_embedding" in name:
            why = _UNTIED if "lora_embedding" in name else "only lora_A and lora_B of linear layers are read"
            raise AdapterError(f"{where} has the tensor {name}; {why}")
        hub = match[1].removeprefix(_PREFIX)
        expert = _EXPERT.match(hub)
        path = hub
        if expert is not None:
            path = f"{expert[1]}.switch_mlp.{_MIXTRAL.get(expert[3], expert[3])}"
        found.append(PeftName(name, path, hub, match[2], int(expert[2]) if expert else None))
    if not found:
        raise AdapterError(f"{where} has no tensors")
    return tuple(found)


def hub_path(path: str, expert: int | None = None) -> str:
    """Where the Hub's model has a module of mlx-lm's tree."""
    stack = _STACK.match(path)
    if stack is None or expert is None:
        return path
    name = stack[2]
    if stack[1].endswith("block_sparse_moe"):
        name = {ours: theirs for theirs, ours in _MIXTRAL.items()}.get(name, name)
    return f"{stack[1]}.experts.{expert}.{name}"


def peft_config(config: AdapterConfig, hub_ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's ``adapter_config.json`` for an adapter.

    Args:
        config: The adapter's.
        hub_ranks: Rank of every module in the Hub's tree.
    Raises:
        AdapterError: It adapts embeddings.
    """
    if config.embeddings:
        raise AdapterError(f"{config.embeddings[0]}: {_UNTIED}; train without --targets embeddings")
    scales = {}
    for path in config.ranks:
        experts = [hub for hub in hub_ranks if _stack_of(hub) == path]
        scales.update(dict.fromkeys(experts or [path], config.scale_of(path)))
    common = max(hub_ranks.values())
    usual = config.scale * common
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base.source if config.base is not None else None,
        "r": common,
        "lora_alpha": _whole(usual),
        "lora_dropout": config.dropout,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(hub_ranks),
        "rank_pattern": {hub: rank for hub, rank in sorted(hub_ranks.items()) if rank != common},
        "alpha_pattern": {
            hub: _whole(scales[hub] * rank)
            for hub, rank in sorted(hub_ranks.items())
            if scales[hub] * rank != usual
        },
    }


def _stack_of(hub: str) -> str | None:
    expert = _EXPERT.match(hub)
    return f"{expert[1]}.switch_mlp.{_MIXTRAL.get(expert[3], expert[3])}" if expert else None


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _scale(peft: _Peft, path: str, rank: int) -> float:
    """alpha / r, or alpha / √r; the patterns match whole ends of a path, as PEFT's do."""
    alpha = _by_pattern(peft.alpha_pattern, path, peft.lora_alpha)
    return alpha / (rank**0.5 if peft.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return default


def _refuse_other_kinds(peft: _Peft, where: Path) -> None:
    odd = {
        f"peft_type {peft.peft_type}": peft.peft_type.upper() != "LORA",
        "use_dora": peft.use_dora,
        f"bias {peft.bias!r}": peft.bias != "none",
        f"modules_to_save {peft.modules_to_save}": bool(peft.modules_to_save),
    }
    for what, is_odd in odd.items():
        if is_odd:
            raise AdapterError(f"{where} has {what}; only plain LoRA adapters are read")
