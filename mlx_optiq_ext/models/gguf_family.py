"""What a GGUF architecture becomes on the Hugging Face side: config.json and tensor names.

Knows the differences between the two layouts (names, rotary order, norm offsets); reads no weights except
the small table of rotary factors. Called by the importer. A new family is one entry of ``_FAMILIES``.

Source: GGUF specification (key names), public config.json files of the families.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from mlx_optiq_ext.errors import UnsupportedModel, UsageError
from mlx_optiq_ext.models.gguf_file import GgufFile, GgufTensor

__all__ = ["SUPPORTED_ARCHITECTURES", "FamilyPlan", "PlannedTensor", "plan_family"]

Change: TypeAlias = Literal["none", "rotary_order", "minus_one"]


class PlannedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor on its way: where it is read, how it is called afterwards, what is done to it."""

    source: GgufTensor
    name: str
    change: Change = "none"
    """rotary_order: rows of a head go from interleaved pairs to halves; minus_one: stored as 1 + weight."""
    num_heads: int = 0
    """Heads in the rows, for rotary_order."""


class FamilyPlan(msgspec.Struct, frozen=True, kw_only=True):
    """config.json without token ids, and every tensor."""

    config: dict[str, Any]
    tensors: tuple[PlannedTensor, ...]


class _Family(msgspec.Struct, frozen=True, kw_only=True):
    model_type: str
    architecture: str
    extra: Callable[[GgufFile], dict[str, Any]]
    interleaved: bool = False
    norm_offset: bool = False
    block_names: dict[str, str] = {}


_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROTARY_FACTORS = "rope_freqs.weight"


def plan_family(file: GgufFile) -> FamilyPlan:
    """Decide config.json and tensor names for a GGUF file.

    Args:
        file: The parsed file.
    Returns:
        The plan; nothing is decoded yet.
    Raises:
        UnsupportedModel: An architecture or a feature that has no translation here.
        UsageError: Metadata the family needs is missing.
    """
    arch = file.text("general.architecture")
    family = _FAMILIES.get(arch)
    if family is None:
        raise UnsupportedModel(
            f"{file.path.name}: GGUF architecture {arch!r} cannot be imported; supported:"
            f" {', '.join(SUPPORTED_ARCHITECTURES)}. Take the model's original folder instead"
        )
    if file.integer(f"{arch}.expert_count", 0):
        raise UnsupportedModel(
            f"{file.path.name}: mixture-of-experts GGUF files cannot be imported; take the"
            " model's original folder"
        )
    config = _shared_config(file, arch, family)
    config |= family.extra(file)
    tensors = tuple(
        _plan_tensor(file, t, family, config) for t in file.tensors.values() if t.name != _ROTARY_FACTORS
    )
    return FamilyPlan(config=config, tensors=tensors)


def _shared_config(file: GgufFile, arch: str, family: _Family) -> dict[str, Any]:
    """The part of config.json that all families here have in common."""
    embedding = file.tensors.get("token_embd.weight")
    width, heads = file.integer(f"{arch}.embedding_length"), file.integer(f"{arch}.attention.head_count")
    if embedding is None or embedding.shape[1:] != (width,):
        raise UnsupportedModel(
            f"{file.path.name}: no tensor token_embd.weight of width {width}; this is not a language model"
        )
    head_dim = file.integer(f"{arch}.attention.key_length", width // max(heads, 1))
    rotary_dim = file.integer(f"{arch}.rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise UnsupportedModel(
            f"{file.path.name}: rotary embedding over {rotary_dim} of {head_dim} values per head cannot be"
            " imported; take the model's original folder"
        )
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": file.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.integer(f"{arch}.context_length"),
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
    }
    scaling = _rope_scaling(file, arch, config)
    return config | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(file: GgufFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The rope_scaling entry, or None for plain rotary embeddings."""
    if _ROTARY_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = file.text(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": file.number(f"{arch}.rope.scaling.factor")}
    raise UnsupportedModel(
        f"{file.path.name}: rotary scaling {kind!r} cannot be imported (none, linear and the Llama-3 table"
        " can); take the model's original folder"
    )


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Recover the Llama-3 scaling from its table of per-frequency divisors, and check it against them."""
    tensor = file.tensors[_ROTARY_FACTORS]
    table = tensor.block_type.decode(file.raw(tensor)).reshape(-1)
    if table.shape != (config["head_dim"] // 2,):
        raise UsageError(f"{file.path.name}: {_ROTARY_FACTORS} has shape {table.shape}; the file is damaged")
    low, high, original = 1.0, 4.0, 8192
    factor = float(table.max())
    dims = config["head_dim"]
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    blend = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - blend) / factor + blend)
    if not np.allclose(table, expected, rtol=1e-3):
        raise UnsupportedModel(
            f"{file.path.name}: its table of rotary factors is not the Llama-3 rule (low 1, high 4, context"
            " 8192); take the model's original folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _plan_tensor(
    file: GgufFile, tensor: GgufTensor, family: _Family, config: dict[str, Any]
) -> PlannedTensor:
    """Name one tensor and say what changes."""
    stem, _, leaf = tensor.name.rpartition(".")
    change: Change = "minus_one" if family.norm_offset and "norm" in stem else "none"
    if stem in _OUTER_NAMES:
        return PlannedTensor(source=tensor, name=f"{_OUTER_NAMES[stem]}.{leaf}", change=change)
    prefix, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    target = (_BLOCK_NAMES | family.block_names).get(part)
    if prefix != "blk" or target is None or leaf not in ("weight", "bias"):
        raise UnsupportedModel(
            f"{file.path.name}: tensor {tensor.name} {tensor.shape} has no place in {family.model_type};"
            " take the model's original folder"
        )
    num_heads = 0
    if family.interleaved and part in ("attn_q", "attn_k"):
        change = "rotary_order"
        num_heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if tensor.shape[:1] != (num_heads * config["head_dim"],) or config["head_dim"] % 2:
            raise UsageError(
                f"{file.path.name}: tensor {tensor.name} {tensor.shape} does not hold {num_heads} heads of"
                f" {config['head_dim']} rows; the file is damaged"
            )
    return PlannedTensor(
        source=tensor, name=f"model.layers.{index}.{target}.{leaf}", change=change, num_heads=num_heads
    )


def _llama_extra(file: GgufFile) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _qwen3_extra(file: GgufFile) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma_extra(_: GgufFile) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _no_extra(_: GgufFile) -> dict[str, Any]:
    return {}


_FAMILIES = {
    "llama": _Family(
        model_type="llama", architecture="LlamaForCausalLM", extra=_llama_extra, interleaved=True
    ),
    "qwen2": _Family(model_type="qwen2", architecture="Qwen2ForCausalLM", extra=_no_extra),
    "qwen3": _Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        extra=_qwen3_extra,
        block_names={"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
    "gemma": _Family(
        model_type="gemma", architecture="GemmaForCausalLM", extra=_gemma_extra, norm_offset=True
    ),
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
