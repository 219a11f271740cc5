"""Load a checkpoint with stock mlx-lm and print what was loaded, as one JSON line.

Run as a script in a fresh process by ``quant.verify``. Imports nothing of this package, so that what is
reported is what a user without it gets.
"""

import ctypes
import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PROMPT = "The quick brown fox jumps over the lazy dog, and nobody was surprised."
_NAN_BYTES = {"mxfp4": (255,), "mxfp8": (255,), "nvfp4": (127, 255)}
_MEMORY_SHARE = 0.8


def main(folder: str, trust_remote_code: bool, blas: str) -> dict[str, Any]:
    """Load ``folder`` and describe it.

    Args:
        folder: The checkpoint.
        trust_remote_code: Let mlx-lm run a model file of the checkpoint.
        blas: Library to load before MLX; empty for none.
    Returns:
        Versions, modules with their storage, parameters, tensors that are not finite, the forward's end.
    """
    if blas:
        ctypes.CDLL(blas, mode=ctypes.RTLD_GLOBAL)
    import mlx_lm
    from mlx.utils import tree_flatten

    config = {"trust_remote_code": trust_remote_code}
    model, tokenizer = mlx_lm.load(
        folder, lazy=True, tokenizer_config=config, trust_remote_code=trust_remote_code
    )
    modules: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "bits") and "scales" in module:
            modules[path] = [module.bits, module.group_size, getattr(module, "mode", "affine")]
    arrays: Any = tree_flatten(model.parameters())
    return {
        "mlx": version("mlx"),
        "mlx_lm": mlx_lm.__version__,
        "ours": sorted(name for name in sys.modules if name.split(".")[0] == "mlx_optiq_ext"),
        "modules": modules,
        "parameters": {name: [str(array.dtype), list(array.shape)] for name, array in arrays},
        "not_finite": _not_finite(Path(folder), modules),
        "forward": _forward(model, tokenizer, Path(folder)),
    }


def _not_finite(folder: Path, modules: dict[str, list[Any]]) -> list[str]:
    """Names of tensors with NaN or infinity, read one at a time."""
    import mlx.core as mx

    found = []
    for file in sorted(folder.glob("model*.safetensors")):
        tensors: Any = mx.load(str(file))
        for name in sorted(tensors):
            array = tensors.pop(name)
            nan_bytes: tuple[int, ...] = ()
            if name.endswith(".scales") and array.dtype == mx.uint8:
                nan_bytes = _NAN_BYTES.get(modules.get(name[: -len(".scales")], [0, 0, ""])[2], ())
            if mx.issubdtype(array.dtype, mx.floating):
                good = mx.all(mx.isfinite(array)).item()
            else:
                good = not any(mx.any(array == value).item() for value in nan_bytes)
            if not good:
                found.append(name)
    return found


def _forward(model: Any, tokenizer: Any, folder: Path) -> str:
    """One short forward pass; in float32 on the CPU, whose half-precision kernels are slow and inexact."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    stored = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if stored > _MEMORY_SHARE * memory:
        return f"skipped: {stored / 1e9:.1f} GB of weights, {memory / 1e9:.1f} GB of memory"
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)
    tokens = tokenizer.encode(_PROMPT)[:16] or [0, 1]
    try:
        logits = model(mx.array([tokens]), cache=make_prompt_cache(model)).astype(mx.float32)
    except RuntimeError as error:
        if "No Metal back-end" not in str(error):
            raise
        return "skipped: this family runs on Metal only"
    high = float(mx.max(logits))
    low = float(mx.min(mx.where(logits == -math.inf, high, logits)))  # families mask unused ids with -inf
    if logits.shape[:2] != (1, len(tokens)):
        return f"failed: logits have shape {list(logits.shape)} for {len(tokens)} tokens"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "failed: logits are not finite"
    return "finite logits" if low < high else "failed: logits are constant"


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2] == "trust", sys.argv[3])))
