"""Tiny models as GGUF files, written with the gguf package in the layout that llama.cpp's converter uses."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma, llama, qwen2, qwen3

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gemma": gemma}
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 272,
    "rope_theta": 50000.0,
    "max_position_embeddings": 512,
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BYTE_TOKENS = [
    chr(code) if 33 <= code <= 126 or 161 <= code <= 172 or 174 <= code <= 255 else None
    for code in range(256)
]


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, in byte order."""
    spare = iter(range(256, 512))
    return [chr(next(spare)) if token is None else token for token in BYTE_TOKENS]


def random_model(family: str, **changes: Any) -> nn.Module:
    """A float32 model with random weights and norms away from one."""
    config = SHAPE | {"model_type": family, "tie_word_embeddings": True} | changes
    model = FAMILIES[family].Model(FAMILIES[family].ModelArgs.from_dict(config))
    rng = np.random.default_rng(3)
    weights = [
        (name, mx.array(rng.normal(1.0 if "norm" in name else 0.0, 0.2, array.shape).astype(np.float32)))
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types: 256 bytes, three merges, four specials; 13 unused rows."""
    merged = ["he", "ll", "Ġw"]
    special = ["<|start|>", "<|end|>", "<tool>", "<|pad|>"]
    unused = [f"<unused{i}>" for i in range(9)]
    tokens = byte_alphabet() + merged + special + unused
    kinds = [1] * 259 + [3, 3, 4, 3] + [5] * 9
    return tokens, ["h e", "l l", "Ġ w"], kinds


def write_gguf(
    path: Path,
    model: nn.Module,
    family: str,
    *,
    pre: str = "llama-bpe",
    add_bos: bool = False,
    **metadata: Any,
) -> Path:
    """Write a model and a byte-level vocabulary; keyword metadata is added as it is."""
    args = model.args
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(512)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    tokens, merges, kinds = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    writer.add_add_bos_token(add_bos)
    for key, value in metadata.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, array in tree_flatten(model.parameters()):
        if "lm_head" in name and args.tie_word_embeddings:
            continue
        writer.add_tensor(_gguf_name(name), np.array(_gguf_layout(name, array, family, args)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{leaf}"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{_PARTS[part]}.{leaf}"


def _gguf_layout(name: str, array: mx.array, family: str, args: Any) -> mx.array:
    if family == "gemma" and "norm" in name:
        return array + 1
    if family != "llama" or not any(part in name for part in ("q_proj", "k_proj")):
        return array
    heads = args.num_attention_heads if "q_proj" in name else args.num_key_value_heads
    rows = array.shape[0]
    order = np.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(0, 2, 1).reshape(-1)
    return array[mx.array(order)]
