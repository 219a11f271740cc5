"""All patches, and which of them are active in this process.

Knows nothing of what a patch does. Called by the start-up hook, by ``mlx_optiq_ext.install`` and by
``optiq doctor``.
"""

import importlib
import sys
from typing import Literal

import msgspec

from mlx_optiq_ext.errors import PatchError
from mlx_optiq_ext.patches.attention import PATCH as ATTENTION
from mlx_optiq_ext.patches.convert_recipe import PATCH as CONVERT_RECIPE
from mlx_optiq_ext.patches.kv_cache import PATCH as KV_CACHE
from mlx_optiq_ext.patches.kv_commands import PATCHES as KV_COMMANDS
from mlx_optiq_ext.patches.lora_command import PATCH as LORA_COMMAND
from mlx_optiq_ext.patches.lora_layers import PATCH as LORA_LAYERS
from mlx_optiq_ext.patches.patch import Patch, Undo, check_version

__all__ = ["PATCHES", "PatchReport", "apply_to", "is_active", "report", "revert_all"]

PATCHES: tuple[Patch, ...] = (
    ATTENTION,
    KV_CACHE,
    CONVERT_RECIPE,
    *KV_COMMANDS,
    LORA_LAYERS,
    LORA_COMMAND,
)

_undos: dict[str, Undo] = {}
_failures: dict[str, str] = {}


class PatchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``optiq doctor`` shows of one patch."""

    name: str
    target: str
    range: str
    why: str
    state: Literal["active", "inactive", "refused", "without effect"]
    detail: str = ""


def activate(module_name: str) -> None:
    """Import one mlx-lm module and apply its patches, for our own commands. Idempotent.

    Raises:
        PatchUnsupported, PatchConflict: As :func:`apply_to`.
    """
    importlib.import_module(module_name)
    apply_to(module_name)


def apply_to(module_name: str) -> None:
    """Apply the patches of one loaded module. Idempotent; after a reload they are applied afresh.

    Raises:
        PatchUnsupported: mlx-lm does not fit; it is left untouched.
        PatchConflict: Somebody else holds the name.
    """
    module = sys.modules[module_name]
    for patch in PATCHES:
        if patch.target != module_name or patch.is_applied(module):
            continue
        try:
            check_version(patch)
            _undos[patch.name] = patch.apply(module)
        except PatchError as error:
            _failures[patch.name] = str(error)
            raise
        _failures.pop(patch.name, None)


def revert_all() -> None:
    """Undo every active patch, the last one first.

    Raises:
        PatchConflict: Somebody else changed a patched name after us.
    """
    for patch in reversed(PATCHES):
        undo = _undos.get(patch.name)
        module = sys.modules.get(patch.target)
        if undo is not None and module is not None and patch.is_applied(module):
            undo()
        _undos.pop(patch.name, None)


def is_active(module_name: str) -> bool:
    """Whether a module is loaded and carries all of its patches."""
    module = sys.modules.get(module_name)
    return module is not None and all(
        patch.is_applied(module) for patch in PATCHES if patch.target == module_name
    )


def report() -> tuple[PatchReport, ...]:
    """Try the effect of every patch. Imports mlx-lm; applies nothing itself."""
    return tuple(_report(patch) for patch in PATCHES)


def _report(patch: Patch) -> PatchReport:
    module = importlib.import_module(patch.target)
    state: Literal["active", "inactive", "refused", "without effect"] = "inactive"
    detail = "the start-up file was not read, or MLX_OPTIQ_DISABLE is set (docs/start-up.md)"
    if patch.name in _failures:
        state, detail = "refused", _failures[patch.name]
    elif patch.is_applied(module):
        detail = patch.probe(module)
        state = "without effect" if detail else "active"
    return PatchReport(
        name=patch.name,
        target=patch.target,
        range=patch.range,
        why=patch.why,
        state=state,
        detail=detail,
    )
