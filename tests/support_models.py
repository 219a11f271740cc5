"""Tiny random models in memory and as folders, and a byte tokenizer: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, qwen3_moe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext.quant.write import CheckpointWriter
from mlx_optiq_ext.types.quant import BitMap

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
_FAMILIES = {"llama": llama, "qwen3_moe": qwen3_moe}


def tiny_model(config: dict[str, Any] = LLAMA, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> nn.Module:
    """A random model, evaluated, with weights large enough that quantizing them changes the output."""
    family = _FAMILIES[config["model_type"]]
    model = family.Model(family.ModelArgs.from_dict(config))
    rng = np.random.default_rng(seed)
    values = []
    for name, array in tree_flatten(model.parameters()):
        noise = rng.standard_normal(array.shape).astype(np.float32)
        value = 1 + 0.1 * noise if array.ndim == 1 else noise * 1.5 / np.sqrt(array.shape[-1])
        values.append((name, mx.array(value).astype(dtype)))
    model.update(tree_unflatten(values))
    mx.eval(model.parameters())
    model.eval()
    return model


def byte_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """One token per byte, then unused ones up to ``vocab_size``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<s>", "</s>", *(f"<unused{i}>" for i in range(vocab_size - len(alphabet) - 2))]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_model_folder(
    folder: Path,
    model: nn.Module,
    config: dict[str, Any] = LLAMA,
    bit_map: BitMap | None = None,
    max_shard_bytes: int = 1 << 30,
) -> Path:
    """Write a model, quantized or not, as a folder that mlx-lm loads."""
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, max_shard_bytes=max_shard_bytes)
    for name, array in tree_flatten(model.parameters()):
        writer.add(name, array)
    tokenizer = byte_tokenizer(config["vocab_size"])
    writer.finish(dict(config), bit_map or BitMap(choices={}), tokenizer=tokenizer)
    return folder


def quantize_by(model: nn.Module, bit_map: BitMap) -> None:
    """Quantize a model in place as the bit map says, with mlx's own rounding."""

    def settings(path: str, module: nn.Module) -> Any:
        choice = bit_map.choices.get(path)
        if choice is None or choice.mode == "keep" or not hasattr(module, "to_quantized"):
            return False
        return {"bits": choice.bits, "group_size": choice.group_size, "mode": choice.mode}

    nn.quantize(model, class_predicate=settings)
    mx.eval(model.parameters())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
