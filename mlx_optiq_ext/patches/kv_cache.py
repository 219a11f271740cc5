"""The seam of ``mlx_lm.models.cache``: caches in mixed precision, made and opened where mlx-lm makes its own.

``make_prompt_cache`` takes ``kv_config``, and our classes have names under which saved caches are found.
Stays light: imported whenever mlx-lm is. Without a configuration the stock function answers.
"""

import functools
import inspect
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlx_optiq_ext.errors import PatchConflict, UsageError
from mlx_optiq_ext.patches.bindings import replace
from mlx_optiq_ext.patches.kv_command import fresh_caches, is_building, running
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable

if TYPE_CHECKING:
    from mlx_optiq_ext.types.kv import KVConfig

__all__ = ["PATCH"]

_NAME = "make_prompt_cache"
_MARK = "_mlx_optiq_ext"


class MixedKVCache:
    """The name under which ``load_prompt_cache`` looks for a saved cache of ours."""

    @classmethod
    def from_state(cls, state: Any) -> Any:
        """The cache that had this state."""
        from mlx_optiq_ext.kv import cache  # deferred: needs mlx

        return cache.MixedKVCache.from_state(state)


class BatchMixedKVCache:
    """The name under which ``load_prompt_cache`` looks for a saved batch of ours."""

    @classmethod
    def from_state(cls, state: Any) -> Any:
        """The batch that had this state."""
        from mlx_optiq_ext.kv import batch  # deferred: needs mlx

        return batch.BatchMixedKVCache.from_state(state)


_STAND_INS = (MixedKVCache, BatchMixedKVCache)


def _apply(module: ModuleType) -> Undo:
    """Check the seam, then change it; on any failure the module is as it was."""
    original = require_callable(module, _NAME, ("model", "max_kv_size"))
    require_callable(module, "load_prompt_cache", ("file_name",))
    for stand_in in _STAND_INS:
        if getattr(module, stand_in.__name__, stand_in) is not stand_in:
            raise PatchConflict(f"{module.__name__} has a {stand_in.__name__} already, from someone else")
    undo_names = replace(module, {_NAME: _wrap(original)})
    for stand_in in _STAND_INS:
        setattr(module, stand_in.__name__, stand_in)

    def undo() -> None:
        undo_names()
        for stand_in in _STAND_INS:
            if getattr(module, stand_in.__name__, None) is stand_in:
                delattr(module, stand_in.__name__)

    return undo


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, _NAME, None), _MARK)


def _probe(module: ModuleType) -> str:
    """Ask every name of ``make_prompt_cache`` for what only ours understands, and open an empty cache."""
    from mlx_optiq_ext.kv import cache, codec, store  # deferred: only the doctor asks
    from mlx_optiq_ext.types.quant import KEEP

    for name, loaded in sys.modules.copy().items():
        if name.partition(".")[0] != "mlx_lm" or not hasattr(loaded, _NAME):
            continue
        try:
            getattr(loaded, _NAME)(None, kv_config=[])
        except UsageError:
            continue
        except Exception as error:  # noqa: BLE001  whatever stock code raises on what it does not know
            return f"{name}.{_NAME} does not reach our caches: {error}"
        return f"{name}.{_NAME} takes any kv_config"
    saved = cache.MixedKVCache(store.Layout(codec.Codec(KEEP, 32), codec.Codec(KEEP, 32))).state
    opened = module.CacheList()
    opened.state = [(saved, "MixedKVCache")]
    if not isinstance(opened[0], cache.MixedKVCache):
        return "a saved cache is not opened as ours"
    return ""


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def make_prompt_cache(model: Any, max_kv_size: int | None = None, kv_config: Any = None) -> list[Any]:
        if kv_config is not None:
            return fresh_caches(model, _config(kv_config), max_kv_size)
        asked = running()
        if asked is not None and asked.config is not None and not is_building():
            caches = asked.caches(model, max_kv_size)
            if caches is not None:
                return caches
        stock: list[Any] = original(model, max_kv_size)
        return stock

    signature = inspect.signature(original)
    added = inspect.Parameter("kv_config", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    make_prompt_cache.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), added]
    )
    setattr(make_prompt_cache, _MARK, PATCH.name)
    return make_prompt_cache


def _config(given: Any) -> "KVConfig":
    """A configuration from what callers may pass: itself, a path, or the content of such a file."""
    from mlx_optiq_ext.formats.kv_config import kv_config_from, read_kv_config  # deferred: only who asks
    from mlx_optiq_ext.types.kv import KVConfig

    if isinstance(given, KVConfig):
        return given
    if isinstance(given, str | os.PathLike):
        return read_kv_config(os.fspath(given))
    if isinstance(given, dict | list):
        return kv_config_from(given, "kv_config")
    raise UsageError(
        f"kv_config is a {type(given).__name__}; pass a KVConfig, a path of a kv_config.json, or its content"
    )


PATCH = Patch(
    name="kv-cache",
    target="mlx_lm.models.cache",
    minimum=(0, 32),
    below=(0, 33),
    why="make_prompt_cache(model, kv_config=…), and saved caches of ours open with load_prompt_cache.",
    apply=_apply,
    is_applied=_is_applied,
    probe=_probe,
)
