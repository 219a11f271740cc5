"""What a patch is, and the questions it asks before it touches anything.

Knows no particular patch. Used by the modules of the seams and by ``registry``.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import msgspec

from mlx_optiq_ext.errors import PatchUnsupported

__all__ = ["Patch", "Undo", "check_version", "mlx_lm_version", "require_callable", "require_list"]

Undo: TypeAlias = Callable[[], None]


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """One reversible change of one mlx-lm module."""

    name: str
    target: str
    """Dotted name of the module that is changed."""
    minimum: tuple[int, ...]
    """Lowest mlx-lm version, inclusive."""
    below: tuple[int, ...]
    """First mlx-lm version that is too new."""
    why: str
    """What users get, in one sentence."""
    apply: Callable[[ModuleType], Undo]
    """Check the seam, change the module, return what restores it exactly."""
    is_applied: Callable[[ModuleType], bool]
    """Whether the module carries the change now (false again after a reload)."""
    probe: Callable[[ModuleType], str]
    """Try the effect; empty when it is there, else what is missing."""

    @property
    def range(self) -> str:
        """The supported versions as a requirement."""
        low, high = (".".join(map(str, version)) for version in (self.minimum, self.below))
        return f"mlx-lm>={low},<{high}"


def mlx_lm_version() -> str:
    """Version of the loaded mlx-lm; empty where it is not loaded or does not say."""
    return str(getattr(sys.modules.get("mlx_lm"), "__version__", ""))


def check_version(patch: Patch) -> None:
    """Refuse an mlx-lm outside of the patch's range.

    Raises:
        PatchUnsupported: The version is outside, or unreadable.
    """
    found = mlx_lm_version()
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not patch.minimum <= numbers < patch.below:
        raise PatchUnsupported(
            f"{patch.name} is made for {patch.range}, found mlx-lm {found or 'of unknown version'}; "
            "install a supported mlx-lm or use `optiq convert`"
        )


def require_callable(module: ModuleType, name: str, parameters: tuple[str, ...] = ()) -> Any:
    """The function ``name`` of ``module``, if it has the parameters we pass.

    More parameters than these do no harm, so equality of signatures is not asked for.

    Raises:
        PatchUnsupported: No such function, or a parameter is missing.
    """
    function = getattr(module, name, None)
    if not callable(function):
        raise _misfit(module, name, "no such function")
    found = inspect.signature(function)
    missing = [parameter for parameter in parameters if parameter not in found.parameters]
    if missing:
        raise _misfit(module, name, f"{name}{found} has no parameter {', '.join(missing)}")
    return function


def require_list(module: ModuleType, name: str) -> list[Any]:
    """The list ``name`` of ``module``.

    Raises:
        PatchUnsupported: No such name, or not a list.
    """
    value = getattr(module, name, None)
    if not isinstance(value, list):
        raise _misfit(module, name, f"expected a list, found {type(value).__name__}")
    return value


def _misfit(module: ModuleType, name: str, found: str) -> PatchUnsupported:
    return PatchUnsupported(
        f"{module.__name__}.{name} of mlx-lm {mlx_lm_version() or '(unknown version)'} is not what the patch "
        f"needs: {found}; `optiq convert` does not depend on it"
    )
