"""A tiny random model with a long context, a real tokenizer and a chat template that knows tools.

Agents open with 5,000 to 15,000 tokens: this one prefills them in seconds on a CPU.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from support_models import LLAMA, save_model_folder, tiny_model
from support_templates import TEMPLATES

__all__ = ["scripted_model"]

_COPIED = ("tokenizer.json", "special_tokens_map.json")


def scripted_model(folder: Path, tokenizer_of: Path) -> Path:
    """Write the model.

    Args:
        folder: To be made.
        tokenizer_of: Model folder whose tokenizer it takes.
    """
    stored = json.loads((tokenizer_of / "tokenizer_config.json").read_text())
    vocab_size = json.loads((tokenizer_of / "config.json").read_text())["vocab_size"]
    config = {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_key_value_heads": 1,
        "vocab_size": vocab_size,
        "torch_dtype": "float32",
        "max_position_embeddings": 131072,
    }
    save_model_folder(folder, tiny_model(config, 0, mx.float32), config)
    for name in _COPIED:
        shutil.copy(tokenizer_of / name, folder / name)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    stored["chat_template"] = TEMPLATES["chatml"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stored))
    return folder
