"""``adapter_config.json``: what an adapter folder says of itself, in every form that is around.

Ours (mlx-lm's keys and a versioned block), plain mlx-lm, the published package's, and PEFT's (``peft``).
Knows names and shapes of tensors, not arrays. Called by ``lora.files`` and the server.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlx_optiq_ext.errors import AdapterError, OptiqError
from mlx_optiq_ext.formats.atomic import write_json_atomic
from mlx_optiq_ext.formats.peft import PEFT_WEIGHTS_FILE, read_peft_config
from mlx_optiq_ext.formats.records import RecordForm, convert_record, parse_json, read_record
from mlx_optiq_ext.formats.safetensors import read_header
from mlx_optiq_ext.types.adapter import AdapterConfig, TrainingFacts
from mlx_optiq_ext.types.quant import ModelFingerprint

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "NATIVE_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "AdapterFile",
    "AdapterForm",
    "find_adapter",
    "write_adapter_config",
]

ADAPTER_CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
NATIVE_WEIGHTS_FILE = "optiq/adapters.safetensors"
"""Ranks as they are; beside a :data:`WEIGHTS_FILE` that is padded to one rank for stock mlx-lm."""
_PUBLISHED_FILE = "optiq_lora_config.json"
_NUMBER = re.compile(r"\.(\d+)\.")
_FORM = RecordForm(name="adapter config", remedy="train the adapter again")

AdapterForm = Literal["optiq", "mlx-lm", "published", "peft"]


class AdapterFile(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter folder, read as far as its headers."""

    folder: str
    form: AdapterForm
    weights: str
    """The file with the factors, absolute."""
    config: AdapterConfig


class _LoraParameters(msgspec.Struct, frozen=True):
    scale: float
    rank: int = 8
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None


class _Block(msgspec.Struct, frozen=True):
    """The block of the published package; it has no ``format_version``."""

    rank_scaling: str | None = None
    applied_ranks: dict[str, int] | None = None


class _Stock(msgspec.Struct, frozen=True):
    """mlx-lm's keys; many more are tolerated."""

    fine_tune_type: str = "lora"
    lora_parameters: _LoraParameters | None = None
    num_layers: int | None = None
    model: str | None = None
    optiq: _Block | None = None


class _PublishedOptions(msgspec.Struct, frozen=True):
    """``optiq_lora_config.json`` as far as it matters here."""

    rank_scaling: str | None = None
    applied_ranks: dict[str, int] | None = None
    source_model: str | None = None
    scale: float | None = None


def find_adapter(folder: Path) -> AdapterFile:
    """Read an adapter folder's configuration, and its ranks from the header of its weights.

    Raises:
        AdapterError: No adapter, one of another kind (DoRA, full fine-tuning), or a damaged one.
    """
    try:
        return _find(folder)
    except AdapterError:
        raise
    except OptiqError as error:
        raise AdapterError(str(error)) from error


def write_adapter_config(
    folder: Path, config: AdapterConfig, weights: str | None, others: Mapping[str, Any] | None = None
) -> None:
    """Write ``adapter_config.json``: stock mlx-lm adapts exactly these paths, at the largest rank.

    Args:
        folder: The adapter's.
        config: What is stored.
        weights: File with the ranks as they are: :data:`NATIVE_WEIGHTS_FILE` where ranks or scales differ,
            else :data:`WEIGHTS_FILE`; None leaves our block out.
        others: Further keys, such as those of the command that trained it; ours win.
    Raises:
        ResourceError: The file cannot be written.
    """
    document: dict[str, Any] = {
        **(others or {}),
        "fine_tune_type": "lora",
        "model": config.base.source if config.base is not None else "",
        "num_layers": 1 + max((int(n) for path in config.ranks for n in _NUMBER.findall(path)), default=0),
        "lora_parameters": {
            "rank": config.max_rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": sorted(config.ranks),
        },
    }
    if weights is not None:
        document["optiq"] = {**msgspec.to_builtins(config), "weights": weights}
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, document)


def _find(folder: Path) -> AdapterFile:
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} has no {ADAPTER_CONFIG_FILE}; give the folder of an adapter")
    document = parse_json(read_record(path, _FORM), str(path), _FORM)
    if not isinstance(document, dict):
        raise AdapterError(f"{path} is no JSON object; {_FORM.remedy}")
    if (folder / PEFT_WEIGHTS_FILE).is_file() or (
        "peft_type" in document and not (folder / WEIGHTS_FILE).is_file()
    ):
        config = read_peft_config(folder, document)
        return _file(folder, "peft", PEFT_WEIGHTS_FILE, config)
    block = document.get("optiq")
    if isinstance(block, dict) and "format_version" in block:
        return _ours(folder, dict(block), str(path))
    return _stock(folder, document, str(path))


def _file(folder: Path, form: AdapterForm, weights: str, config: AdapterConfig) -> AdapterFile:
    if wrong := config.check():
        raise AdapterError(f"{folder}: {wrong}")
    return AdapterFile(
        folder=str(folder), form=form, weights=str((folder / weights).absolute()), config=config
    )


def _ours(folder: Path, block: dict[str, Any], where: str) -> AdapterFile:
    weights = block.pop("weights", WEIGHTS_FILE)
    if weights not in (WEIGHTS_FILE, NATIVE_WEIGHTS_FILE):
        raise AdapterError(f"{where} names the weights {weights!r}; {_FORM.remedy}")
    config = convert_record(block, AdapterConfig, where, _FORM)
    found = _ranks(folder / weights)
    if found != config.ranks:
        odd = next(path for path in (*found, *config.ranks) if found.get(path) != config.ranks.get(path))
        raise AdapterError(
            f"{where} gives {odd} rank {config.ranks.get(odd, 0)}, {weights} {found.get(odd, 0)}: the two "
            "files do not belong together"
        )
    return _file(folder, "optiq", weights, config)


def _stock(folder: Path, document: dict[str, Any], where: str) -> AdapterFile:
    try:
        stock = msgspec.convert(document, _Stock)
        published = _published(folder)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{where} is not a valid {_FORM.name}: {error}") from error
    if stock.fine_tune_type != "lora":
        raise AdapterError(
            f"{where} is of the type {stock.fine_tune_type!r}; only low-rank adapters (lora) can be used: "
            "fuse it with `mlx_lm.fuse`, or train it again as lora"
        )
    parameters = stock.lora_parameters
    scale = parameters.scale if parameters is not None else published.scale if published else None
    if scale is None:
        raise AdapterError(f"{where} has no lora_parameters.scale; {_FORM.remedy}")
    block = stock.optiq or (published and _Block(published.rank_scaling, published.applied_ranks))
    scaling = block.rank_scaling if block else None
    ranks = _ranks(folder / WEIGHTS_FILE)
    config = AdapterConfig(
        base=_base(stock.model or (published.source_model if published else None)),
        ranks=ranks,
        scale=scale,
        embeddings=tuple(path for path in ranks if _looks_like_embedding(path)),
        dropout=parameters.dropout if parameters is not None else 0.0,
        rank_scaling=scaling if scaling in ("by_sensitivity", "by_bits", "constant") else None,  # type: ignore[arg-type]
        training=TrainingFacts(settings={} if not scaling else {"rank_scaling": scaling}),
    )
    return _file(folder, "published" if block else "mlx-lm", WEIGHTS_FILE, config)


def _published(folder: Path) -> _PublishedOptions | None:
    path = folder / _PUBLISHED_FILE
    if not path.is_file():
        return None
    return msgspec.convert(parse_json(read_record(path, _FORM), str(path), _FORM), _PublishedOptions)


def _base(source: str | None) -> ModelFingerprint | None:
    """What a foreign file says of its base: a name, no hash."""
    return ModelFingerprint(model_type="", sha256="", source=source) if source else None


def _looks_like_embedding(path: str) -> bool:
    return "embed" in path.rpartition(".")[2] or path.rpartition(".")[2] in {"wte", "wpe"}


def _ranks(weights: Path) -> dict[str, int]:
    """Rank of every path, from the shapes in mlx-lm's orientation: (I, r) and (r, O); experts transposed."""
    if not weights.is_file():
        raise AdapterError(f"{weights} is missing; the adapter is not complete")
    header = read_header(weights)
    shapes = {name: tensor.shape for name, tensor in header.items()}
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        other = shapes.get(f"{path}.lora_b" if leaf == "lora_a" else f"{path}.lora_a")
        if leaf not in ("lora_a", "lora_b") or other is None or len(shape) != len(other):
            raise AdapterError(f"{weights} has the tensor {name}, which is no pair of low-rank factors")
        if leaf == "lora_a":
            inner = (shape[-1], other[0]) if len(shape) == 2 else (shape[1], other[-1])
            if len(shape) not in (2, 3) or inner[0] != inner[1] or shape[:-2] != other[:-2]:
                raise AdapterError(f"{weights}: the factors of {path}, {shape} and {other}, do not fit")
            ranks[path] = inner[0]
    return dict(sorted(ranks.items()))
