"""Replace an object under every name that mlx-lm's loaded modules bound to it.

A name imported with ``from x import y`` is bound a second time, so changing ``x.y`` alone is not enough.
Modules outside of mlx-lm are never touched. Called by the patches.
"""

import sys
from types import ModuleType
from typing import Any

from mlx_optiq_ext.errors import PatchConflict
from mlx_optiq_ext.patches.patch import Undo

__all__ = ["rebind", "replace"]


def replace(home: ModuleType, name: str, replacement: Any) -> Undo:
    """Put ``replacement`` where ``home.name`` is, there and wherever else mlx-lm bound the same object.

    Args:
        home: The module that defines the name.
        name: The name.
        replacement: What takes its place.
    Returns:
        The undo: every name bound to ``replacement`` by then gets the identical original back. It raises
        PatchConflict, changing nothing, when somebody replaced ``home.name`` meanwhile.
    """
    original = getattr(home, name)

    def undo() -> None:
        if getattr(home, name, None) is not replacement:
            raise PatchConflict(
                f"{home.__name__}.{name} was replaced by someone else after us; undo that change first, or "
                "start a new process with MLX_OPTIQ_DISABLE=1"
            )
        rebind(replacement, original)

    setattr(home, name, replacement)
    rebind(original, replacement)
    return undo


def rebind(old: Any, new: Any) -> int:
    """Give ``new`` to every module-level name of loaded mlx-lm modules that is ``old``.

    Returns:
        How many names were changed.
    """
    count = 0
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "mlx_lm" or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                count += 1
    return count
