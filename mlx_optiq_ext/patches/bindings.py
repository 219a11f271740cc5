"""Replace objects under every name that mlx-lm's loaded modules bound to them.

A name imported with ``from x import y`` is bound a second time, so changing ``x.y`` alone is not enough.
Modules outside of mlx-lm are never touched. Called by the patches.
"""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mlx_optiq_ext.errors import PatchConflict
from mlx_optiq_ext.patches.patch import Undo

__all__ = ["rebind", "replace"]


def replace(home: ModuleType, replacements: Mapping[str, Any]) -> Undo:
    """Put each replacement where ``home.NAME`` is, there and wherever else mlx-lm bound the same object.

    Args:
        home: The module that defines the names.
        replacements: Name → what takes its place.
    Returns:
        The undo: every name bound to a replacement by then gets the identical original back. It raises
        PatchConflict, changing nothing, when somebody replaced one of the names meanwhile.
    """
    originals = {name: getattr(home, name) for name in replacements}

    def undo() -> None:
        for name, replacement in replacements.items():
            if getattr(home, name, None) is not replacement:
                raise PatchConflict(
                    f"{home.__name__}.{name} was replaced by someone else after us; undo that change first, "
                    "or start a new process with MLX_OPTIQ_DISABLE=1"
                )
        for name, replacement in replacements.items():
            rebind(replacement, originals[name])

    for name, replacement in replacements.items():
        rebind(originals[name], replacement)
    return undo


def rebind(old: Any, new: Any) -> int:
    """Give ``new`` to every module-level name of loaded mlx-lm modules that is ``old``.

    Returns:
        How many names were changed.
    """
    count = 0
    for module_name, module in sys.modules.copy().items():
        if module_name.partition(".")[0] != "mlx_lm" or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                count += 1
    return count
