"""Checkpoints that cannot be converted are refused with one clear message."""

import json
from pathlib import Path

import mlx.nn as nn
import pytest
from support_models import save_model_folder, tiny_model

from mlx_optiq_ext.errors import ModelError, UnsupportedModel
from mlx_optiq_ext.models.load import load_model
from mlx_optiq_ext.models.walk import list_units
from mlx_optiq_ext.types.model import ModelRef


@pytest.mark.parametrize("model_type", ["never_heard_of", "olmo"])
def test_a_family_that_mlx_lm_cannot_build_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model", tiny_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(UnsupportedModel, match="org/name: mlx-lm cannot build this model"):
        load_model(ModelRef(path=str(folder), source="org/name"))


def test_a_damaged_weight_file_is_named(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "model", tiny_model())
    (file,) = folder.glob("model*.safetensors")
    file.write_bytes(b"cut")
    with pytest.raises(ModelError, match=f"{file.name}: .*; download the model again"):
        load_model(ModelRef(path=str(folder), source="org/name"))


def test_a_quantized_model_is_refused() -> None:
    model = tiny_model()
    nn.quantize(model, group_size=64, bits=4)
    with pytest.raises(UnsupportedModel, match="is quantized already"):
        list_units(model, {}, [])
