"""A model that is loaded: weights, tokenizer, caches, limits, and what its answers start from.

Knows how one model is opened and nothing of requests. Called by ``owner`` on the owner thread.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import make_prompt_cache

from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.engine.adapters import ModelAdapters
from mlx_optiq_ext.engine.constrain import Constrainer
from mlx_optiq_ext.engine.defaults import default_sampling
from mlx_optiq_ext.engine.memory import CacheSizes, least_limit
from mlx_optiq_ext.engine.prompt import Rendered, Renderer
from mlx_optiq_ext.engine.prompt_size import longest_token, require_tokenizable
from mlx_optiq_ext.engine.snapshot import forgets
from mlx_optiq_ext.engine.stored_bits import stored_bpw
from mlx_optiq_ext.errors import EngineError, FingerprintMismatch, RequestError, ResourceError
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.kv.build import build_caches, follow_weights
from mlx_optiq_ext.kv.fold import rotated_blocks
from mlx_optiq_ext.kv.observe import observe
from mlx_optiq_ext.models.arrays import named_arrays
from mlx_optiq_ext.models.families import find_blocks
from mlx_optiq_ext.models.load import cast_floats, float_dtype, load_model, load_tokenizer
from mlx_optiq_ext.models.tape import logits_of
from mlx_optiq_ext.types.chat import Generation, Sampling
from mlx_optiq_ext.types.kv import KVConfig
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.progress import Progress, ProgressSink
from mlx_optiq_ext.types.quant import ModelFingerprint
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import ServedModel

__all__ = ["Loaded", "ModelSpec", "NoRoom", "load"]

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
_CONTEXT_UNKNOWN = 8192
_LEAST_CONTEXT = 256


class NoRoom(ResourceError):
    """A model does not fit into what is left.

    Args:
        nbytes: That its weights and a short prompt take.
    """

    status = 503

    def __init__(self, message: str, nbytes: int) -> None:
        super().__init__(message)
        self.nbytes = nbytes


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model that may be loaded."""

    name: str
    ref: ModelRef
    kv_config: KVConfig | None = None
    created: int = 0


class Loaded:
    """An open model.

    Args:
        spec: Where it came from.
        model: Its weights may still be lazy.
        config: Its config.json.
        tokenizer: mlx-lm's wrapper.
        options: Of the server.
    Raises:
        FingerprintMismatch: The KV configuration belongs to another model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: nn.Module,
        config: dict[str, Any],
        tokenizer: Any,
        options: ServeOptions,
    ) -> None:
        self.spec = spec
        self.model = model
        self.tokenizer = tokenizer
        weights = fingerprint(spec.ref)
        self.kv = _storage(spec, weights, model, config, options)
        """Follows the weights; None: mlx-lm's caches."""
        self.vocab_size = _vocab_size(model)
        self.renderer = Renderer(tokenizer, reasoning=options.reasoning)
        self.constrainer = Constrainer(tokenizer, self.vocab_size)
        self.stops = StopSequences([(token,) for token in tokenizer.eos_token_ids])
        self._longest_token = longest_token(tokenizer)
        self.defaults = default_sampling(Path(spec.ref.path), options)
        self.sizes = CacheSizes(model, self.fresh_caches)
        self.plain_sizes = CacheSizes(model, lambda: make_prompt_cache(model))
        """Of mlx-lm's caches, which embeddings are computed with."""
        self._weights_nbytes = sum(array.nbytes for _, array in named_arrays(model.parameters()))
        self.model_context = _model_context(config)
        self._most_context = min(options.context or self.model_context, self.model_context)
        self.context = self._most_context
        caches = self.fresh_caches()
        self.num_caches = len(caches)
        self.forgets = any(forgets(cache) for cache in caches)
        dtype = float_dtype(model, {})
        self.adapters = ModelAdapters(model, weights.sha256, dtype)
        self.cache_key = f"{weights.sha256} {dtype} {msgspec.json.encode(self.kv).decode()}"
        self._bpw = stored_bpw(Path(spec.ref.path), config, model)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of the model and its adapters."""
        return self._weights_nbytes + self.adapters.nbytes

    def fresh_caches(self) -> list[Any]:
        """Empty caches of one row."""
        if self.kv is None:
            caches: list[Any] = make_prompt_cache(self.model)
            return caches
        return build_caches(self.model, self.kv)

    def sampling(self, wanted: Sampling) -> Sampling:
        """A request's sampling with the defaults where it says nothing."""
        known = {name: getattr(wanted, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        missing = {name: getattr(self.defaults, name) for name, value in known.items() if value is None}
        return msgspec.structs.replace(wanted, **missing)

    def require_context(self, cache_nbytes: int) -> None:
        """See that ``cache_nbytes`` of KV cache hold a short prompt.

        Raises NoRoom where they do not.
        """
        least = min(_LEAST_CONTEXT, self._most_context)
        fits = self.sizes.tokens_within(cache_nbytes, self._most_context)
        if fits < least:
            wanted = self.weights_nbytes + self.sizes.nbytes(least)
            raise NoRoom(
                f"{self.spec.name}: {format_nbytes(self.weights_nbytes)} of weights leave "
                f"{format_nbytes(max(0, cache_nbytes))} for the KV cache, enough for {fits} tokens; alone it "
                f"needs --memory {least_limit(wanted)}, or serve a smaller model",
                wanted,
            )

    def limit_context(self, cache_nbytes: int) -> None:
        """Serve as much context as ``cache_nbytes`` of KV cache hold, and no more."""
        self.context = max(1, self.sizes.tokens_within(cache_nbytes, self._most_context))

    def check(self) -> None:
        """Run one token: after a failure, the proof that the model still can.

        Raises:
            EngineError: Its logits are not finite. Anything else the model raises passes through.
        """
        run: Any = self.model
        out = run(mx.array([[0]]), cache=self.fresh_caches())
        if not bool(mx.all(mx.isfinite(logits_of(out)))):
            raise EngineError(f"{self.spec.name} answers with numbers that are not finite")

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Refuse what the embedding has no row for: MLX would read memory that is not its own.

        Raises:
            RequestError: A token is not one of the model's.
        """
        wrong = next((at for at, token in enumerate(tokens) if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            message = f"token {tokens[wrong]} is not one of the model's {self.vocab_size}"
            raise RequestError(message, param=f"{param}[{wrong}]")

    def render(self, request: Generation) -> Rendered:
        """Prompt tokens of a request.

        Raises:
            RequestError: It cannot be rendered, or has far more text than the context holds.
        """
        require_tokenizable(request, self.context, self._longest_token)
        rendered = self.renderer.render(request)
        self.check_tokens(rendered.tokens, "prompt")
        return rendered

    def describe(self) -> ServedModel:
        """What ``/v1/models`` says of it."""
        return ServedModel(
            id=self.spec.name,
            source=Path(self.spec.ref.source).name if self.spec.ref.is_local else self.spec.ref.source,
            loaded=True,
            created=self.spec.created,
            context=self.context,
            weights_nbytes=self.weights_nbytes,
            bpw=self._bpw,
            adapters=self.adapters.names,
            kv_bits=self.kv.bits_per_number if self.kv is not None else None,
            thinks=self.renderer.thinks,
            calls_tools=bool(self.tokenizer.has_tool_calling),
        )


def load(spec: ModelSpec, options: ServeOptions, limit_nbytes: int, progress: ProgressSink) -> Loaded:
    """Open a model on this thread and evaluate its weights.

    Args:
        limit_nbytes: What weights may take.
        progress: Gets one event per block.
    Raises:
        NoRoom: The weights do not fit.
        FingerprintMismatch: The KV configuration belongs to another model.
        ModelError: It cannot be opened.
    """
    model, config = load_model(spec.ref, trust_remote_code=options.trust_remote_code)
    dtype = _serving_dtype(model, config, options.dtype)
    if dtype is not None:
        cast_floats(model, dtype)
    needed = sum(array.nbytes for _, array in named_arrays(model.parameters()))
    if needed > limit_nbytes:
        raise NoRoom(
            f"{spec.name}: {format_nbytes(needed)} of weights, and {format_nbytes(max(0, limit_nbytes))} are "
            f"left for them; alone it needs --memory {least_limit(needed)}, or quantize it (`optiq convert`)",
            needed,
        )
    tokenizer = load_tokenizer(spec.ref, trust_remote_code=options.trust_remote_code)
    loaded = Loaded(spec, model, config, tokenizer, options)
    blocks = find_blocks(model)
    for k, block in enumerate(blocks.modules):
        mx.eval(block.parameters())
        progress(Progress(stage=f"load {spec.name}", done=k + 1, total=len(blocks)))
    mx.eval(model.parameters())
    return loaded


def _storage(
    spec: ModelSpec,
    weights: ModelFingerprint,
    model: nn.Module,
    config: dict[str, Any],
    options: ServeOptions,
) -> KVConfig | None:
    kv = spec.kv_config
    if kv is None:
        return None
    if kv.model is not None and kv.model.sha256 != weights.sha256:
        raise FingerprintMismatch(
            f"the KV configuration was measured on {kv.model.source or 'another model'}, whose weights are "
            f"not those of {spec.name}; make one with `optiq kv-cache {spec.name}`"
        )
    if options.kv_recent is not None:
        kv = msgspec.structs.replace(kv, recent=options.kv_recent)
    return follow_weights(kv, observe(model), rotated_blocks(config))


def _serving_dtype(model: nn.Module, config: dict[str, Any], wanted: str) -> mx.Dtype | None:
    """The type to compute in; None leaves every tensor as it is stored."""
    if wanted != "auto":
        return float_dtype(model, config, wanted)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    # Half-precision kernels on a CPU are inexact and many times slower (docs/platforms.md).
    return mx.float32 if on_cpu and float_dtype(model, config) != mx.float32 else None


def _model_context(config: dict[str, Any]) -> int:
    """Tokens that the model was made for."""
    for part in (config.get("text_config") or {}, config):
        for name in _CONTEXT_NAMES:
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return _CONTEXT_UNKNOWN


def _vocab_size(model: nn.Module) -> int:
    """Width of the logits, from a forward pass of one token that is not evaluated."""
    run: Any = model
    out = run(mx.zeros((1, 1), dtype=mx.int32))
    return int(logits_of(out).shape[-1])
