"""PEFT's tensors against ours: the same numbers, transposed, experts apart.

Knows arrays; names and configuration are in ``formats.peft``. Called by ``files`` and ``optiq lora export``.
"""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.formats.adapter import ADAPTER_CONFIG_FILE, AdapterFile
from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.formats.peft import PEFT_WEIGHTS_FILE, hub_path, parse_names, peft_config
from mlx_optiq_ext.lora.factors import Adapter, Factors, pad_rank

__all__ = ["read_peft_factors", "write_peft"]


def read_peft_factors(file: AdapterFile) -> dict[str, Factors]:
    """Factors by path of mlx-lm's tree; lazy. Experts without an adapter get zeros.

    Raises:
        AdapterError: A factor lacks its other half, or the experts of a layer have different shapes.
    """
    arrays: dict[str, mx.array] = dict(mx.load(file.weights))  # type: ignore[arg-type]
    halves: dict[tuple[str, int | None], dict[str, mx.array]] = {}
    for entry in parse_names(arrays, file.weights):
        halves.setdefault((entry.path, entry.expert), {})[entry.factor] = arrays[entry.name]
    found: dict[str, dict[int | None, Factors]] = {}
    for (path, expert), pair in halves.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(f"{file.weights}: the factors of {path} do not fit each other")
        found.setdefault(path, {})[expert] = Factors(pair["A"].T, pair["B"].T)
    return {path: _joined(path, experts) for path, experts in sorted(found.items())}


def write_peft(folder: Path, adapter: Adapter) -> None:
    """Write an adapter as PEFT stores it.

    Raises:
        AdapterError: It adapts embeddings.
    """
    arrays: dict[str, mx.array] = {}
    ranks: dict[str, int] = {}
    for path, factors in adapter.factors.items():
        for hub, (a, b) in _apart(path, factors).items():
            ranks[hub] = int(a.shape[-1])
            arrays[f"base_model.model.{hub}.lora_A.weight"] = mx.contiguous(a.T)
            arrays[f"base_model.model.{hub}.lora_B.weight"] = mx.contiguous(b.T)
    document = peft_config(adapter.config, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / PEFT_WEIGHTS_FILE), arrays, metadata={"format": "pt"})
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, document)


def _joined(path: str, experts: Mapping[int | None, Factors]) -> Factors:
    if None in experts:
        return experts[None]
    numbers = [number for number in experts if number is not None]
    rank = max(each.rank for each in experts.values())
    padded = {number: pad_rank(experts[number], rank) for number in numbers}
    first = padded[numbers[0]]
    if any(each.a.shape != first.a.shape or each.b.shape != first.b.shape for each in padded.values()):
        raise AdapterError(f"the experts of {path} have adapters of different shapes")
    zeros = Factors(mx.zeros_like(first.a), mx.zeros_like(first.b))
    rows = [padded.get(number, zeros) for number in range(max(numbers) + 1)]
    return Factors(mx.stack([row.a for row in rows]), mx.stack([row.b for row in rows]))


def _apart(path: str, factors: Factors) -> dict[str, Factors]:
    """One entry per module of the Hub's tree."""
    if factors.a.ndim == 2:
        return {hub_path(path): factors}
    if hub_path(path, 0) == path:
        raise AdapterError(f"{path}: it is not known how the Hub's model names the experts of this layer")
    return {hub_path(path, e): Factors(factors.a[e], factors.b[e]) for e in range(factors.a.shape[0])}
