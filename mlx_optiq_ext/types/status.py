"""What the server is doing, as one snapshot: health, metrics and the dashboard draw from it."""

from typing import Literal, TypeAlias

import msgspec

__all__ = [
    "AdapterStatus",
    "ClientStatus",
    "Dialect",
    "EngineStatus",
    "LatencySum",
    "LayerBytes",
    "PrefixCacheStatus",
    "RowStatus",
    "ServedModel",
]

Dialect: TypeAlias = Literal["openai", "responses", "anthropic"]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a request can name."""

    id: str
    """Folder or repository name, as ``/v1/models`` lists it."""
    aliases: tuple[str, ...] = ()
    """Other names that the user gave it."""
    source: str
    """Folder name or repository, never a path of this machine."""
    loaded: bool
    created: int
    """Seconds since 1970 of the checkpoint's config.json."""
    context: int
    """Tokens of prompt and answer together; 0 while unknown (not loaded yet)."""
    weights_nbytes: int = 0
    bpw: float | None = None
    kv_bits: float | None = None
    """Stored bits per cached number; None: full precision."""
    adapters: tuple[str, ...] = ()
    sees_images: bool = False
    thinks: bool = False
    calls_tools: bool = False


class AdapterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that requests can name."""

    name: str
    model: str
    source: str
    """Folder name or repository, never a path of this machine."""
    rank: int
    """The largest of its ranks."""
    ranks: dict[str, int] = {}
    """By path of the layer."""
    base_bits: dict[str, int] = {}
    """Of the layers under them, by the same paths; 16 where the base is not quantized."""
    nbytes: int = 0
    fits_base: bool | None = None
    """Whether it was trained on these very weights; None where it does not say."""
    is_default: bool = False
    """Requests that name no adapter get it."""
    requests: int = 0


class RowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is queued or running."""

    id: str
    model: str
    adapter: str | None
    """That answers, also where it is the default one; None: the base, or not known yet."""
    state: Literal["queued", "prefill", "decode"]
    session: str
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    completion_tokens: int
    tokens_per_s: float
    """Of decoding, since the first token."""
    age_s: float
    first_token_s: float | None = None
    """From submission to the first token; None before it."""


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A program that asked lately."""

    name: str
    """Product in its ``User-Agent``, without version."""
    dialect: Dialect
    requests: int
    """While it stayed among those seen last."""
    last_seen_s: float
    """Seconds since its last request."""


class LayerBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one layer's cache holds over all running rows."""

    name: str
    nbytes: int
    k_bits: float | None = None
    v_bits: float | None = None


class PrefixCacheStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The prefix cache: what it holds and how often it helped."""

    entries: int = 0
    nbytes: int = 0
    limit_nbytes: int = 0
    disk_entries: int = 0
    disk_nbytes: int = 0
    lookups: int = 0
    hits: int = 0
    """Lookups that reused at least one token."""
    reused_tokens: int = 0
    looked_up_tokens: int = 0
    evictions: int = 0


class LatencySum(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram: counts per upper bound, sum and number, in seconds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than bounds: the last counts what is above all of them. Not cumulative."""
    total: float
    number: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, taken between two steps."""

    state: Literal["loading", "ready", "draining", "failed"]
    version: str
    uptime_s: float
    models: tuple[ServedModel, ...]
    adapters: tuple[AdapterStatus, ...] = ()
    rows: tuple[RowStatus, ...] = ()
    queue_limit: int = 0
    max_rows: int = 0
    memory_limit_nbytes: int = 0
    memory_nbytes: int = 0
    """Held by MLX now."""
    peak_memory_nbytes: int = 0
    weights_nbytes: int = 0
    kv_nbytes: int = 0
    kv_layers: tuple[LayerBytes, ...] = ()
    prefix_cache: PrefixCacheStatus = PrefixCacheStatus()
    decode_tokens_per_s: float = 0.0
    """Over the last ten seconds, all rows."""
    prefill_tokens_per_s: float = 0.0
    requests_total: int = 0
    requests_finished: dict[str, int] = {}
    """By finish reason; failures by error kind."""
    prompt_tokens_total: int = 0
    completion_tokens_total: int = 0
    restarts: int = 0
    """How often the batch was rebuilt after a failing step."""
    time_to_first_token: LatencySum | None = None
    request_time: LatencySum | None = None
    adapter_requests: dict[str, int] = {}
    clients: tuple[ClientStatus, ...] = ()
    """Seen last, newest first; known to the HTTP server, which adds them."""
