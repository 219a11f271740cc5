"""A tiny model with an adapter, a tokenizer with a chat template, and tokens to train on."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from support_models import LLAMA, byte_tokenizer, tiny_model

from mlx_optiq_ext.lora.checkpoint import Store
from mlx_optiq_ext.lora.logprobs import LogProbs
from mlx_optiq_ext.lora.loop import Trainer
from mlx_optiq_ext.lora.masks import Pair, Sample
from mlx_optiq_ext.lora.sft import Imitation
from mlx_optiq_ext.types.training import TrainOptions

CHAT_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template: str = CHAT_TEMPLATE) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def adapted_model(
    config: dict[str, Any] = LLAMA,
    *,
    seed: int = 0,
    rank: int = 4,
    dropout: float = 0.0,
    b_noise: float = 0.0,
) -> nn.Module:
    """A float32 model with an adapter in every block; ``b_noise`` makes it do something."""
    model = tiny_model(config, seed, mx.float32)
    model.freeze()
    mx.random.seed(seed)
    linear_to_lora_layers(
        model, config["num_hidden_layers"], {"rank": rank, "scale": 2.0, "dropout": dropout}
    )
    if b_noise:
        rng = np.random.default_rng(seed + 1)
        for _, module in model.named_modules():
            if "lora_b" in module:
                noise = rng.standard_normal(module.lora_b.shape).astype(np.float32)
                module.lora_b = mx.array(b_noise * noise)
    mx.eval(model.parameters())
    return model


def samples(count: int, *, seed: int = 0, vocab: int = 300, longest: int = 24) -> list[Sample]:
    """Random tokens, of which the last third is learnt."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(rng.integers(6, longest))
        tokens = tuple(int(token) for token in rng.integers(0, vocab, length))
        found.append(
            Sample(where=f"data, line {index + 1}", tokens=tokens, spans=((2 * length // 3, length),))
        )
    return found


def pairs(count: int, *, seed: int = 0, vocab: int = 300) -> list[Pair]:
    """Random prompts with two answers; the chosen ones use other words than the rejected ones."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt = [int(token) for token in rng.integers(0, vocab, 5)]
        sides = []
        for words in (range(10), range(10, 20)):
            length = int(rng.integers(3, 8))
            answer = [int(token) for token in rng.choice(words, length)]
            tokens = (*prompt, *answer)
            sides.append(Sample(where="", tokens=tokens, spans=((5, len(tokens)),)))
        found.append(Pair(where=f"pairs, line {index + 1}", chosen=sides[0], rejected=sides[1]))
    return found


def sft_trainer(
    folder: Path,
    options: TrainOptions,
    train: list[Sample],
    valid: list[Sample] | None = None,
    model: nn.Module | None = None,
) -> Trainer[Sample]:
    folder.mkdir(parents=True, exist_ok=True)
    model = model or adapted_model(dropout=options.dropout)
    objective = Imitation(LogProbs(model))
    return Trainer(model, objective, (train, valid or []), options, Store(folder, {"data": "x"}))


def adapter_arrays(model: nn.Module) -> dict[str, Any]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}
