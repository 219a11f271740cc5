"""The engine's snapshot: what ``/health``, ``/metrics`` and the dashboard draw.

Called on the owner thread between steps, so that nothing changes while it is taken.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from msgspec.structs import replace

from mlx_optiq_ext import __version__
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.names import ModelNames
from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.types.status import EngineStatus, LayerBytes, ServedModel

__all__ = ["engine_status"]


def engine_status(
    state: Any, owner: Owner, specs: Mapping[str, ModelSpec], jobs: Sequence[Job], names: ModelNames
) -> EngineStatus:
    """Everything, now."""
    counters = owner.counters
    return EngineStatus(
        state=state,
        version=__version__,
        uptime_s=time.monotonic() - counters.started,
        models=tuple(_served(owner, spec, names) for spec in specs.values()),
        adapters=tuple(each for loaded in owner.models for each in loaded.adapters.status(loaded.spec.name)),
        rows=tuple(job.row() for job in jobs),
        queue_limit=owner.options.max_queue,
        max_rows=owner.options.max_rows,
        memory_limit_nbytes=owner.limit_nbytes,
        memory_nbytes=mx.get_active_memory(),
        peak_memory_nbytes=mx.get_peak_memory(),
        weights_nbytes=owner.models.weights_nbytes,
        kv_nbytes=owner.budget.rows_nbytes,
        kv_layers=_layers(owner),
        prefix_cache=owner.prefixes.status(),
        decode_tokens_per_s=counters.decoded.per_second(),
        prefill_tokens_per_s=counters.prefilled.per_second(),
        requests_total=counters.requests,
        requests_finished=dict(counters.finished),
        prompt_tokens_total=counters.prompt_tokens,
        completion_tokens_total=counters.completion_tokens,
        restarts=counters.restarts,
        time_to_first_token=counters.time_to_first_token.snapshot(),
        request_time=counters.request_time.snapshot(),
        adapter_requests=dict(counters.adapters),
    )


def _served(owner: Owner, spec: ModelSpec, names: ModelNames) -> ServedModel:
    aliases = tuple(alias for alias, model in names.aliases.items() if model == spec.name)
    loaded = owner.models.get(spec.name)
    if loaded is not None:
        return replace(loaded.describe(), aliases=aliases)
    source = Path(spec.ref.source).name if spec.ref.is_local else spec.ref.source
    return ServedModel(
        id=spec.name, source=source, loaded=False, created=spec.created, context=0, aliases=aliases
    )


def _layers(owner: Owner) -> tuple[LayerBytes, ...]:
    """Bytes per cache; layers of several models bear the models' names."""
    models = list(owner.models)
    return tuple(
        layer
        for loaded in models
        for layer in _layers_of(owner, loaded, f"{loaded.spec.name}:" if len(models) > 1 else "")
    )


def _layers_of(owner: Owner, loaded: Loaded, before: str) -> list[LayerBytes]:
    """With the bits of keys and values where they are stored in our form; with none held too."""
    kv, batch = loaded.kv, owner.batches.get(loaded.spec.name)
    held = (batch.layer_nbytes() if batch is not None else []) or [0] * loaded.num_caches
    bits = {layer.index: (layer.k.bpw(), layer.v.bpw()) for layer in kv.layers} if kv is not None else {}
    unknown = (None, None)
    return [
        LayerBytes(
            name=f"{before}{k}",
            nbytes=nbytes,
            k_bits=bits.get(k, unknown)[0],
            v_bits=bits.get(k, unknown)[1],
        )
        for k, nbytes in enumerate(held)
    ]
