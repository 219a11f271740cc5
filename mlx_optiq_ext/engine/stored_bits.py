"""How many bits a served checkpoint stores for each weight: of its files, whatever it is computed in.

Called by ``served``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import get_total_parameters

from mlx_optiq_ext.formats.safetensors import read_folder

__all__ = ["stored_bpw"]


def stored_bpw(folder: Path, config: Mapping[str, Any], model: nn.Module) -> float | None:
    """Bits in the checkpoint's files over the weights of the model.

    Args:
        folder: Of the checkpoint.
        config: Its config.json.
        model: Loaded from it; says how many weights there are.
    Returns:
        None where it is not quantized.
    """
    if "quantization" not in config:
        return None
    num_bits = 8 * sum(tensor.nbytes for tensor in read_folder(folder).values())
    return num_bits / int(get_total_parameters(model))
