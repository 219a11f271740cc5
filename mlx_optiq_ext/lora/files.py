"""Adapters on disk: read every form, write one that stock mlx-lm loads too.

A folder has ``adapter_config.json`` and ``adapters.safetensors``, padded with zeros to one rank for stock
mlx-lm; where that changes anything, ``optiq/adapters.safetensors`` beside it has the ranks as they are. Knows
nothing of training. Called by ``train``, by ``optiq lora`` and by the server.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.formats.adapter import (
    NATIVE_WEIGHTS_FILE,
    WEIGHTS_FILE,
    AdapterFile,
    find_adapter,
    write_adapter_config,
)
from mlx_optiq_ext.formats.atomic import unwritable
from mlx_optiq_ext.lora.factors import Adapter, Factors, pad_rank
from mlx_optiq_ext.lora.layers import adapt_modules, adapted_modules, get_factors, set_factors
from mlx_optiq_ext.lora.peft import read_peft_factors
from mlx_optiq_ext.lora.targets import target_kind
from mlx_optiq_ext.types.adapter import AdapterConfig, AdapterOptions, RankMap, TrainingFacts
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = [
    "describe_adapter",
    "load_adapter",
    "locate_factors",
    "read_adapter",
    "save_adapter",
    "write_adapter",
]

_IN_BLOCK = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..+)$")


def describe_adapter(
    ranks: RankMap,
    options: AdapterOptions,
    *,
    base: ModelFingerprint | None,
    dropout: float = 0.0,
    training: TrainingFacts | None = None,
) -> AdapterConfig:
    """What an adapter of these ranks says of itself."""
    return AdapterConfig(
        base=base,
        ranks={path: rank for path, rank in sorted(ranks.ranks.items()) if rank},
        scale=options.scale,
        embeddings=tuple(target.path for target in ranks.adapted if target.kind == "embedding"),
        dropout=dropout,
        rank_scaling=ranks.scaling,
        targets=options.targets,
        training=training or TrainingFacts(),
        code_version=__version__,
    )


def save_adapter(folder: Path, model: nn.Module, config: AdapterConfig) -> None:
    """Write the adapter that a model carries; files already there are replaced, the config last.

    Raises:
        AdapterError: The model's adapter layers are not those of ``config``.
        ResourceError: The disk is full.
    """
    factors = {path: get_factors(layer) for path, layer in adapted_modules(model).items()}
    found = {path: each.rank for path, each in factors.items()}
    if found != config.ranks:
        odd = sorted(set(found.items()) ^ set(config.ranks.items()))[0][0]
        raise AdapterError(
            f"{odd} has rank {found.get(odd, 0)} on the model and {config.ranks.get(odd, 0)} in the config"
        )
    write_adapter(folder, Adapter(config, factors))


def write_adapter(
    folder: Path, adapter: Adapter, *, plain: bool = False, others: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter; evaluates its factors.

    Args:
        folder: Made where it is missing; an adapter in it is replaced, the config last.
        adapter: What to write.
        plain: Only what stock mlx-lm writes too: the padded form, without our block.
        others: Further keys of the config.
    Raises:
        AdapterError: A number is not finite.
        ResourceError: The disk is full.
    """
    config, factors = adapter
    bad = next((path for path, each in factors.items() if not each.is_finite()), None)
    if bad is not None:
        raise AdapterError(f"the adapter's factors of {bad} are not finite; nothing is written")
    uneven = len(set(config.ranks.values())) > 1 or bool(config.scales)
    native = uneven and not plain
    if native:
        _write_arrays(folder / NATIVE_WEIGHTS_FILE, _as_stock(factors))
    padded = {path: _for_stock(each, config, path) for path, each in factors.items()}
    _write_arrays(folder / WEIGHTS_FILE, _as_stock(padded))
    weights = NATIVE_WEIGHTS_FILE if native else WEIGHTS_FILE
    write_adapter_config(folder, config, None if plain else weights, others)
    if not native:
        (folder / NATIVE_WEIGHTS_FILE).unlink(missing_ok=True)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter of any form: ours, mlx-lm's, the published package's, PEFT's. Lazy arrays.

    Raises:
        AdapterError: As :func:`mlx_optiq_ext.formats.adapter.find_adapter`.
    """
    return _read(find_adapter(folder))


def load_adapter(model: nn.Module, folder: Path) -> AdapterConfig:
    """Put a stored adapter onto a base model, ready to run or to be trained on.

    Nothing is frozen or unfrozen but the factors, which are trainable and float32.

    Returns:
        Its configuration; paths are those of ``model``.
    Raises:
        AdapterError: It is damaged, not finite, or made for another architecture.
    """
    config, factors = locate_factors(read_adapter(folder), model)
    layers = adapt_modules(model, config.ranks, scale=config.scale, dropout=config.dropout)
    for path, layer in layers.items():
        wide = Factors(factors[path].a.astype(mx.float32), factors[path].b.astype(mx.float32))
        if not wide.is_finite():
            raise AdapterError(f"{folder}: the factors of {path} are not finite; train the adapter again")
        set_factors(layer, wide)
        layer.scale = config.scale_of(path)
    return config


def locate_factors(adapter: Adapter, model: nn.Module) -> Adapter:
    """Give an adapter the paths of a model, whose tree may have another prefix than the file's.

    Raises:
        AdapterError: A path is no module of the model, or two are the same one.
    """
    modules = {path: module for path, module in model.named_modules() if target_kind(module) is not None}
    places = {path: _place(path, modules) for path in adapter.factors}
    if len(set(places.values())) < len(places):
        raise AdapterError("two modules of the adapter are one of this model; it was made for another")
    config = replace(
        adapter.config,
        ranks={places[path]: rank for path, rank in adapter.config.ranks.items()},
        scales={places[path]: scale for path, scale in adapter.config.scales.items()},
        embeddings=tuple(places[path] for path in adapter.config.embeddings),
    )
    return Adapter(config, {places[path]: each for path, each in adapter.factors.items()})


def _place(path: str, modules: Mapping[str, nn.Module]) -> str:
    if path in modules:
        return path
    inside = _IN_BLOCK.search(path)
    found = [name for name in modules if inside is not None and name.endswith(f".{inside[1]}")]
    if len(found) != 1:
        raise AdapterError(
            f"{path} is no linear, expert or embedding layer of this model; the adapter was made for another"
        )
    return found[0]


def _read(file: AdapterFile) -> Adapter:
    if file.form == "peft":
        return Adapter(file.config, read_peft_factors(file))
    arrays: dict[str, mx.array] = dict(mx.load(file.weights))  # type: ignore[arg-type]
    factors = {}
    for path in file.config.ranks:
        a, b = arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"]
        factors[path] = Factors(a.swapaxes(-1, -2), b.swapaxes(-1, -2)) if a.ndim == 3 else Factors(a, b)
    return Adapter(file.config, factors)


def _for_stock(factors: Factors, config: AdapterConfig, path: str) -> Factors:
    """At the largest rank and the common scale."""
    own = config.scale_of(path)
    b = factors.b if own == config.scale else factors.b * (own / config.scale)
    return pad_rank(Factors(factors.a, b), config.max_rank)


def _as_stock(factors: Mapping[str, Factors]) -> Iterable[tuple[str, mx.array]]:
    """Names and orientation of mlx-lm: experts are (E, r, I) and (E, O, r)."""
    for path, (a, b) in sorted(factors.items()):
        swap = a.ndim == 3
        yield f"{path}.lora_a", a.swapaxes(-1, -2) if swap else a
        yield f"{path}.lora_b", b.swapaxes(-1, -2) if swap else b


def _write_arrays(path: Path, arrays: Iterable[tuple[str, mx.array]]) -> None:
    """All arrays or nothing."""
    temporary = path.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(temporary), dict(arrays), metadata={"format": "mlx"})
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # mlx raises the latter
        raise unwritable(path, OSError(str(error))) from error
    finally:
        temporary.unlink(missing_ok=True)
