"""The engine's status as Prometheus metrics, read when they are asked for.

Counters are the engine's own, so nothing is counted twice. Names begin with ``optiq_``.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.status import EngineStatus, LatencySum

__all__ = ["StatusCollector", "metrics_text"]

_STATES = ("loading", "ready", "draining", "failed")
_ROW_STATES = ("queued", "prefill", "decode")


class StatusCollector(Collector):
    """Describes one snapshot of an engine each time it is collected."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        status = self._engine.status()
        yield from _server(status)
        yield from _requests(status)
        yield from _memory(status)
        yield from _prefix_cache(status)
        yield from _latencies(status)


def metrics_text(engine: Engine) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(engine))
    return generate_latest(registry)


def _server(status: EngineStatus) -> Iterator[Metric]:
    state = GaugeMetricFamily("optiq_state", "1 for the state that the server is in.", labels=["state"])
    for name in _STATES:
        state.add_metric([name], float(status.state == name))
    yield state
    yield GaugeMetricFamily("optiq_uptime_seconds", "Since the engine started.", status.uptime_s)
    yield CounterMetricFamily("optiq_restarts", "Batches rebuilt after a failing step.", status.restarts)
    loaded = GaugeMetricFamily("optiq_model_loaded", "1 for models in memory.", labels=["model"])
    weights = GaugeMetricFamily("optiq_model_weights_bytes", "Bytes of weights.", labels=["model"])
    bits = GaugeMetricFamily("optiq_model_bits_per_weight", "Everything stored.", labels=["model"])
    for model in status.models:
        loaded.add_metric([model.id], float(model.loaded))
        weights.add_metric([model.id], model.weights_nbytes)
        if model.bpw is not None:
            bits.add_metric([model.id], model.bpw)
    yield from (loaded, weights, bits)


def _requests(status: EngineStatus) -> Iterator[Metric]:
    rows = GaugeMetricFamily("optiq_rows", "Requests by what they wait for or do.", labels=["state"])
    for state in _ROW_STATES:
        rows.add_metric([state], sum(row.state == state for row in status.rows))
    yield rows
    yield GaugeMetricFamily("optiq_rows_limit", "Requests that may decode together.", status.max_rows)
    yield GaugeMetricFamily("optiq_queue_limit", "Requests that may wait.", status.queue_limit)
    yield CounterMetricFamily("optiq_requests", "Requests taken.", status.requests_total)
    ended = CounterMetricFamily(
        "optiq_requests_finished",
        "Requests by finish reason, or by the kind of their error.",
        labels=["reason"],
    )
    for reason, number in status.requests_finished.items():
        ended.add_metric([reason], number)
    yield ended
    yield CounterMetricFamily(
        "optiq_prompt_tokens", "Of all requests, cached ones included.", status.prompt_tokens_total
    )
    yield CounterMetricFamily(
        "optiq_completion_tokens", "Generated, reasoning included.", status.completion_tokens_total
    )
    yield GaugeMetricFamily(
        "optiq_decode_tokens_per_second", "All rows, last ten seconds.", status.decode_tokens_per_s
    )
    yield GaugeMetricFamily(
        "optiq_prefill_tokens_per_second", "All rows, last ten seconds.", status.prefill_tokens_per_s
    )
    adapters = CounterMetricFamily("optiq_adapter_requests", "Requests per adapter.", labels=["adapter"])
    for adapter, number in status.adapter_requests.items():
        adapters.add_metric([adapter], number)
    yield adapters


def _memory(status: EngineStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("optiq_memory_limit_bytes", "Ceiling of everything.", status.memory_limit_nbytes)
    yield GaugeMetricFamily("optiq_memory_bytes", "Held by MLX.", status.memory_nbytes)
    yield GaugeMetricFamily("optiq_memory_peak_bytes", "Most that MLX held.", status.peak_memory_nbytes)
    yield GaugeMetricFamily("optiq_weights_bytes", "All loaded models.", status.weights_nbytes)
    yield GaugeMetricFamily("optiq_kv_bytes", "KV caches of running requests.", status.kv_nbytes)
    layers = GaugeMetricFamily(
        "optiq_kv_layer_bytes", "KV cache of one layer over all running requests.", labels=["layer"]
    )
    for layer in status.kv_layers:
        layers.add_metric([layer.name], layer.nbytes)
    yield layers


def _prefix_cache(status: EngineStatus) -> Iterator[Metric]:
    cache = status.prefix_cache
    gauges = {
        "entries": (cache.entries, "Prefixes in memory."),
        "bytes": (cache.nbytes, "Bytes of prefixes in memory."),
        "limit_bytes": (cache.limit_nbytes, "Ceiling of prefixes in memory."),
        "disk_entries": (cache.disk_entries, "Prefixes on disk."),
        "disk_bytes": (cache.disk_nbytes, "Bytes of prefixes on disk."),
    }
    for name, (value, words) in gauges.items():
        yield GaugeMetricFamily(f"optiq_prefix_cache_{name}", words, value)
    counters = {
        "lookups": (cache.lookups, "Prompts looked up."),
        "hits": (cache.hits, "Lookups that reused at least one token."),
        "reused_tokens": (cache.reused_tokens, "Prompt tokens that needed no prefill."),
        "looked_up_tokens": (cache.looked_up_tokens, "Prompt tokens of all lookups."),
        "evictions": (cache.evictions, "Prefixes dropped for room."),
    }
    for name, (value, words) in counters.items():
        yield CounterMetricFamily(f"optiq_prefix_cache_{name}", words, value)


def _latencies(status: EngineStatus) -> Iterator[Metric]:
    if status.time_to_first_token is not None:
        yield _histogram(
            "optiq_time_to_first_token_seconds",
            "From submission to the first token.",
            status.time_to_first_token,
        )
    if status.request_time is not None:
        yield _histogram("optiq_request_seconds", "From submission to the end.", status.request_time)


def _histogram(name: str, words: str, latency: LatencySum) -> Metric:
    """Prometheus counts cumulatively, the engine per bucket."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, latency.bounds), "+Inf"), latency.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(name, words, buckets=buckets, sum_value=latency.total)
