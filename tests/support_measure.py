"""A short calibration text, options for quick measurements, and a guard against forward passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_models import LLAMA, save_model_folder, tiny_model

from mlx_optiq_ext.convert.rewrite import Rewriter
from mlx_optiq_ext.models.tape import Tape
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import MeasureOptions

TOKENS, WINDOW = 256, 32
_WORDS = (
    "river",
    "stone",
    "light",
    "under",
    "north",
    "seven",
    "glass",
    "paper",
    "quiet",
    "field",
    "0x1F",
    "++i",
)


def write_calibration(file: Path, seed: int = 0, domains: tuple[str, ...] = ("prose", "code")) -> Path:
    """Texts of 400 bytes, ten per domain, each domain with its own words."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(10):
        for index, domain in enumerate(domains):
            words = rng.choice(_WORDS[index * 4 : index * 4 + 8], size=80)
            lines.append(json.dumps({"domain": domain, "text": f"{number} " + " ".join(words)}))
    file.write_text("\n".join(lines) + "\n")
    return file


def save_tiny(folder: Path, config: dict[str, Any] = LLAMA, seed: int = 0) -> ModelRef:
    """A tiny random model on disk."""
    save_model_folder(folder, tiny_model(config, seed), config)
    return ModelRef(path=str(folder), source=folder.name)


def quick_options(calibration: Path | str, **changed: Any) -> MeasureOptions:
    """Few tokens, few choices, fast rounding, no probes."""
    settings: dict[str, Any] = {
        "calibration": str(calibration), "num_tokens": TOKENS, "window": WINDOW, "candidate_bits": "2,4,8",
        "correction": "fast", "probes": 0,
    }  # fmt: skip
    return MeasureOptions(**{**settings, **changed})


def forbid_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the model is run over calibration text or rewritten."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a forward pass was started")

    monkeypatch.setattr(Tape, "forward", refuse)
    monkeypatch.setattr(Rewriter, "run", refuse)
