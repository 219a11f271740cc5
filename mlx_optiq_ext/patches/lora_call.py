"""One training of stock ``mlx_lm.lora`` with our ranks: who gets which, and what is stored at the end.

The stock function chooses the modules; ranks come from ``lora.ranks``. Called by ``lora_layers`` and
``lora_command``, which import it when it is needed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlx_optiq_ext import __version__
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.adapter import ADAPTER_CONFIG_FILE
from mlx_optiq_ext.formats.safetensors import read_header
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.files import write_adapter
from mlx_optiq_ext.lora.layers import DORA_REFUSAL, adapted_modules, get_factors, set_factors
from mlx_optiq_ext.lora.ranks import plan_for
from mlx_optiq_ext.lora.targets import list_targets
from mlx_optiq_ext.patches.kv_options import model_folder
from mlx_optiq_ext.patches.lora_command import say
from mlx_optiq_ext.types.adapter import AdapterConfig, AdapterOptions, TrainingFacts
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.quant import ModelFingerprint, SensitivityTable

__all__ = ["RankRequest", "adapt", "train"]


class RankRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ``optiq`` entry of ``lora_parameters``."""

    rank_scaling: str | None = None
    max_parameters: int | None = None
    sensitivity: str | None = None
    """A sensitivity file, or a folder that has one."""
    ranks: dict[str, int] | None = None
    """By path, where they are decided already: as stored, or after this module decided them."""
    show: bool = False
    """Say on stderr what was decided."""


def adapt(stock: Callable[[], Any], given: Mapping[str, Any]) -> Any:
    """Let the stock function put adapters on a model, then give each its rank.

    The decided ranks are written into ``config["optiq"]["ranks"]``, from where they reach the stored file.

    Args:
        stock: The call, arguments bound.
        given: The same arguments by name: ``model``, ``config``, ``use_dora``.
    Raises:
        UsageError: DoRA, an unknown entry, or what the rule lacks.
        BudgetInfeasible: The ceiling does not hold the least ranks.
    """
    model, config = given["model"], given["config"]
    request = _request(config["optiq"])
    if given.get("use_dora"):
        raise UsageError(f"ranks per module are for LoRA: {DORA_REFUSAL}")
    targets = {target.path: target for target in list_targets(model)}
    result = stock()
    layers = adapted_modules(model)
    ranks = request.ranks
    if ranks is None:
        options = msgspec.convert(
            {
                "rank": config["rank"],
                "rank_scaling": request.rank_scaling,
                "max_parameters": request.max_parameters,
            },
            AdapterOptions,
        )
        chosen = tuple(targets[path] for path in layers if path in targets)
        plan = plan_for(chosen, options, table=_table(request))
        ranks = plan.ranks
        if request.show:
            say(
                f"ranks {plan.scaling}: {min(ranks.values())} to {max(ranks.values())} in {len(ranks)} "
                f"modules, {plan.num_parameters:,} parameters"
            )
            for note in plan.notes:
                say(note)
    for path, layer in layers.items():
        _resize(layer, ranks.get(path, get_factors(layer).rank))
    config["optiq"] = {**config["optiq"], "ranks": dict(sorted(ranks.items()))}
    return result


def train(stock: Callable[[], Any], args: Any, model: nn.Module) -> Any:
    """Run a stock training with our ranks, and store its adapter in both forms.

    Args:
        stock: The call, arguments bound.
        args: The command's; ``lora_parameters`` gets our entry while it trains.
        model: The base.
    Raises:
        UsageError: Another kind of training, or adapter weights to resume from that do not fit.
        OptiqError: As :func:`adapt`.
    """
    if args.fine_tune_type != "lora":
        reason = f": {DORA_REFUSAL}" if args.fine_tune_type == "dora" else ""
        raise UsageError(
            f"--optiq-rank-scaling does not go with --fine-tune-type {args.fine_tune_type}{reason}"
        )
    folder = model_folder(args.model)
    sensitivity = getattr(args, "optiq_sensitivity", None) or _own_sensitivity(folder)
    request = RankRequest(
        rank_scaling=args.optiq_rank_scaling,
        max_parameters=getattr(args, "optiq_max_parameters", None),
        sensitivity=sensitivity,
        ranks=_resumed(args.resume_adapter_file),
        show=True,
    )
    args.lora_parameters = {**args.lora_parameters, "optiq": msgspec.to_builtins(request)}
    base = fingerprint(ModelRef(path=str(folder), source=args.model)) if folder is not None else None
    result = stock()
    if mx.distributed.init().rank() == 0:
        _store(args, model, base)
    return result


def _store(args: Any, model: nn.Module, base: ModelFingerprint | None) -> None:
    """Replace what the stock command stored by both forms; its own facts stay in the config."""
    folder = Path(args.adapter_path)
    layers = adapted_modules(model)
    factors = {path: get_factors(layer) for path, layer in layers.items()}
    config = AdapterConfig(
        base=base,
        ranks={path: each.rank for path, each in factors.items()},
        scale=args.lora_parameters["scale"],
        embeddings=tuple(path for path, layer in layers.items() if "embedding" in layer),
        dropout=args.lora_parameters["dropout"],
        rank_scaling=args.optiq_rank_scaling,
        training=TrainingFacts(method="mlx_lm.lora", data=str(args.data), steps=args.iters),
        code_version=__version__,
    )
    stored = json.loads((folder / ADAPTER_CONFIG_FILE).read_bytes())
    write_adapter(folder, Adapter(config, factors), others=stored)


def _request(entry: Any) -> RankRequest:
    try:
        return msgspec.convert(entry, RankRequest)
    except msgspec.ValidationError as error:
        raise UsageError(f"lora_parameters.optiq: {error}; it takes rank_scaling or ranks") from error


def _table(request: RankRequest) -> SensitivityTable | None:
    return read_sensitivity(request.sensitivity) if request.sensitivity is not None else None


def _own_sensitivity(folder: Path | None) -> str | None:
    """The file beside the base's weights."""
    file = folder / "optiq" / "sensitivity.json" if folder is not None else None
    return str(file) if file is not None and file.is_file() else None


def _resumed(file: str | None) -> dict[str, int] | None:
    """Ranks of the weights that the training goes on from: those are kept."""
    if file is None:
        return None
    shapes = {name: tensor.shape for name, tensor in read_header(Path(file)).items()}
    ends = {name: shape for name, shape in shapes.items() if name.endswith(".lora_a")}
    return {
        name.removesuffix(".lora_a"): shape[-1] if len(shape) == 2 else shape[1]
        for name, shape in ends.items()
    }


def _resize(layer: Any, rank: int) -> None:
    """Give a new adapter layer another rank; mlx-lm's own start: A uniform, B zero."""
    factors = get_factors(layer)
    if factors.rank == rank:
        return
    bound = factors.a.shape[-2] ** -0.5
    a = mx.random.uniform(-bound, bound, (*factors.a.shape[:-1], rank))
    b = mx.zeros((*factors.b.shape[:-2], rank, factors.b.shape[-1]))
    set_factors(layer, Factors(a, b))
