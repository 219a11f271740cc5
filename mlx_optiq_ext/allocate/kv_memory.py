"""Size of the KV cache, from a model's config.json.

Knows config keys, not modules. Errs on the large side where a config does not say. Called for ``--fit``.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["kv_bytes_per_token"]

# Families whose attention in mlx-lm caches the latent vector itself (their projections are MultiLinear).
_LATENT = frozenset(
    {
        *("bailing_hybrid", "bailing_moe_v3", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2"),
        *("kimi_k3", "kimi_linear", "longcat_flash", "longcat_flash_ngram", "mistral4"),
    }
)
# Blocks without a cache that grows with the context; the single letters are Nemotron-H's.
_STATEFUL = frozenset(
    {
        "linear_attention",
        "mamba",
        "mamba2",
        "conv",
        "recurrent",
        "rglru",
        "mlp",
        "moe",
        "linear",
        "-",
        "M",
        "E",
    }
)
_WINDOWED = frozenset(("sliding_attention", "chunked_attention", "local", "local_attention"))


def kv_bytes_per_token(config: Mapping[str, Any], context: int, *, float_bits: int = 16) -> int | None:
    """Bytes of KV cache at ``context`` tokens, divided by ``context`` and rounded up.

    Layers with a sliding window count up to their window; recurrent and state-space layers, whose state
    does not grow, count nothing.

    Args:
        config: Parsed config.json; a nested ``text_config`` is followed.
        context: Tokens in the cache, ≥ 1.
        float_bits: Width of a cached number.
    Returns:
        None where the config does not name layers or heads.
    """
    text = {**config, **(config.get("text_config") or {})}
    num_blocks = _first_int(text, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
    width = _numbers_per_token(text)
    if not num_blocks or not width:
        return None
    window = _first_int(text, "sliding_window", "sliding_window_size", "attention_chunk_size") or context
    tokens = sum(
        min(context, window) if windowed else context for windowed in _cached_blocks(text, num_blocks)
    )
    nbytes = tokens * width * float_bits // 8
    return -(-nbytes // context)


def _numbers_per_token(text: Mapping[str, Any]) -> int:
    """Cached numbers of one attention layer per token; 0 where unknown."""
    heads = _first_int(text, "num_attention_heads", "n_heads", "n_head", "num_heads")
    latent, rope = _first_int(text, "kv_lora_rank"), _first_int(text, "qk_rope_head_dim") or 0
    if latent and str(text.get("model_type", "")) in _LATENT:
        return latent + rope
    if latent and heads:
        nope, value = _first_int(text, "qk_nope_head_dim") or 0, _first_int(text, "v_head_dim") or 0
        return heads * (nope + rope + value)
    hidden = _first_int(text, "hidden_size", "n_embd", "dim", "d_model")
    head_dim = _first_int(text, "head_dim", "attention_head_dim")
    if not head_dim and hidden and heads:
        head_dim = hidden // heads
    kv_heads = _first_int(text, "num_key_value_heads", "n_kv_heads", "num_kv_heads") or heads
    if not kv_heads or not head_dim:
        return 0
    whole = _first_int(text, "num_global_key_value_heads") or kv_heads
    return 2 * max(kv_heads * head_dim, whole * (_first_int(text, "global_head_dim") or head_dim))


def _cached_blocks(text: Mapping[str, Any], num_blocks: int) -> list[bool]:
    """One entry per block with a growing cache: whether a sliding window bounds it."""
    kinds = text.get("layer_types") or text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if kinds:
        return [kind in _WINDOWED for kind in kinds if kind not in _STATEFUL]
    if isinstance(text.get("full_attn_idxs"), list):
        return [False] * len(text["full_attn_idxs"])
    interval = _first_int(text, "full_attention_interval", "attn_layer_period")
    if interval:
        return [False] * -(-num_blocks // interval)
    pattern = _first_int(text, "sliding_window_pattern")
    if pattern and text.get("sliding_window"):
        return [(index + 1) % pattern != 0 for index in range(num_blocks)]
    return [False] * num_blocks


def _first_int(values: Mapping[str, Any], *names: str) -> int | None:
    """The first of the named entries that is a positive integer."""
    found = (values.get(name) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
