"""Tiny random instances of mlx-lm's families, as folders in the layout that mlx-lm writes.

A config is the common values that the family's own argument class knows, plus what makes the family what
it is (layer kinds, experts, shared caches). Widths are multiples of 32, so that most tensors can be packed.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from support_family_configs import COMMON, NAMED
from support_models import byte_tokenizer
from support_other_families import OTHERS

FAMILIES = {**NAMED, **OTHERS}
_TEXT_CLASSES = ("TextArgs", "TextModelArgs", "TextConfig", "ModelArgs")


def family_config(name: str) -> dict[str, Any]:
    """config.json of a tiny instance."""
    given = dict(FAMILIES[name])
    model_type = given.pop("model_type", name)
    inner = given.pop("text_config", None)
    module = importlib.import_module(
        f"mlx_lm.models.{mlx_lm_utils.MODEL_REMAPPING.get(model_type, model_type)}"
    )
    config = {**_common(module.ModelArgs), **given, "model_type": model_type, "torch_dtype": "bfloat16"}
    if inner is not None:
        text = {**inner}
        text_module = importlib.import_module(f"mlx_lm.models.{text.pop('module', module.__name__[14:])}")
        kinds = [getattr(text_module, kind) for kind in _TEXT_CLASSES if hasattr(text_module, kind)]
        config["text_config"] = {**_common(kinds[0]), **text}
        config["text_config"].setdefault("model_type", text_module.__name__[14:])
    return config


def tiny_family(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A random bfloat16 model of a family, evaluated, and its config.

    Constant parameters (norms, gates, decay rates) are moved a little, so that nothing is switched off.
    """
    config = family_config(name)
    kind, arguments = mlx_lm_utils._get_classes(config=json.loads(json.dumps(config)))
    mx.random.seed(seed)
    model = kind(arguments.from_dict(json.loads(json.dumps(config))))
    weights = {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    rng = np.random.default_rng(seed)
    values = []
    for name_, array in tree_flatten(model.parameters()):
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if name_ in weights:
            value = noise * 1.5 / np.sqrt(array.shape[-1])
        else:
            value = np.array(array.astype(mx.float32)) + 0.1 * noise
        values.append((name_, mx.array(value).astype(mx.bfloat16 if may_cast(name_) else mx.float32)))
    model.update(tree_unflatten(values))
    mx.eval(model.parameters())
    model.eval()
    return model, config


def save_family(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a tiny instance as a folder that mlx-lm loads, in one file."""
    model, config = tiny_family(name, seed)
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    byte_tokenizer(COMMON["vocab_size"]).save_pretrained(str(folder))
    return folder


def _common(kind: Any) -> dict[str, Any]:
    """The common values that an argument class has a field for."""
    return {field.name: COMMON[field.name] for field in dataclasses.fields(kind) if field.name in COMMON}
