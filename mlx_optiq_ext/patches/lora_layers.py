"""The seam of mlx-lm's adapter layers: a rank for every module in place of one for all.

``linear_to_lora_layers`` reads them from an ``optiq`` entry of its configuration; every other call reaches
the stock function with the arguments as given. Stays light: it is imported whenever mlx-lm is.
"""

import functools
import inspect
from types import ModuleType
from typing import Any

from mlx_optiq_ext.patches.bindings import replace
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable

__all__ = ["PATCH"]

_NAME = "linear_to_lora_layers"
_MARK = "_mlx_optiq_ext"


def _apply(module: ModuleType) -> Undo:
    original = require_callable(module, _NAME, ("model", "num_layers", "config", "use_dora"))
    return replace(module, {_NAME: _wrap(original)})


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, _NAME, None), _MARK)


def _probe(module: ModuleType) -> str:
    """Give two layers of a tiny model a rank each."""
    import mlx.nn as nn  # deferred: only `optiq doctor` asks

    block = nn.Module()
    block.up, block.down = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Module()
    model.layers = [block]
    ranks = {"layers.0.up": 1, "layers.0.down": 3}
    config = {"rank": 2, "scale": 1.0, "dropout": 0.0, "optiq": {"ranks": ranks}}
    getattr(module, _NAME)(model, 1, config)
    found = [int(layer.lora_a.shape[-1]) for layer in (block.up, block.down) if "lora_a" in layer]
    return "" if found == [1, 3] else f"{_NAME} gave ranks {found} where 1 and 3 were asked for"


def _wrap(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def linear_to_lora_layers(*args: Any, **kwargs: Any) -> Any:
        given = _bound(signature, args, kwargs)
        config = given.get("config")
        if not isinstance(config, dict) or "optiq" not in config:
            return original(*args, **kwargs)
        from mlx_optiq_ext.patches.lora_call import adapt  # deferred: heavy

        return adapt(functools.partial(original, *args, **kwargs), given)

    setattr(linear_to_lora_layers, _MARK, PATCH.name)
    return linear_to_lora_layers


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # the stock function words this one
        return {}


PATCH = Patch(
    name="lora-layers",
    target="mlx_lm.tuner.utils",
    minimum=(0, 32),
    below=(0, 33),
    why="adapters of mlx-lm with a rank per module",
    apply=_apply,
    is_applied=_is_applied,
    probe=_probe,
)
