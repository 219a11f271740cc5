"""The KV storage that the running mlx-lm command asked for, and the caches made from it.

One per process, set while a command's ``main`` runs: its model is loaded and served on other threads too.
Imports nothing heavy until caches are made. Called by ``kv_cache`` and ``kv_options``.
"""

import contextlib
import copy
import sys
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mlx_optiq_ext.errors import OptiqError

if TYPE_CHECKING:  # every import of mlx-lm comes here, and few of them ask for caches
    from mlx_optiq_ext.types.kv import KVConfig

__all__ = ["KVCommand", "command", "fresh_caches", "is_building", "running"]


class KVCommand:
    """One run of a command of mlx-lm.

    Args:
        name: What messages begin with: ``mlx_lm.generate``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.config: KVConfig | None = None
        """Asked for with ``--kv-config``; None: stock caches."""
        self._drafts: list[weakref.ref[Any]] = []
        self._told: list[weakref.ref[Any]] = []

    def say(self, text: str) -> None:
        """One line on stderr, as the command's own."""
        print(f"{self.name}: {text}", file=sys.stderr)

    def note_draft(self, model: Any) -> None:
        """Remember that a model drafts: it may do without the configuration."""
        if not _has(self._drafts, model):
            self._drafts = [ref for ref in self._drafts if ref() is not None] + [weakref.ref(model)]

    def caches(self, model: Any, max_kv_size: int | None) -> list[Any] | None:
        """Fresh caches as asked for; None where the model keeps stock ones, which is said once on stderr.

        Raises:
            OptiqError: The configuration does not fit, and the model is no draft.
        """
        assert self.config is not None
        try:
            caches = fresh_caches(model, self.config, max_kv_size)
            self._tell_unnamed(model, max_kv_size)
            return caches
        except OptiqError as error:
            if not _has(self._drafts, model):
                raise
            if not _has(self._told, model):
                self._told.append(weakref.ref(model))
                self.say(f"the draft model keeps stock KV caches: {error}")
            return None

    def _tell_unnamed(self, model: Any, max_kv_size: int | None) -> None:
        """Say once which caches the configuration leaves in full precision."""
        if _has(self._told, model):
            return
        from mlx_optiq_ext.kv.build import unnamed_caches  # loaded already: it made the caches
        from mlx_optiq_ext.kv.observe import observe

        assert self.config is not None
        self._told.append(weakref.ref(model))
        unnamed = unnamed_caches(observe(model, max_kv_size), self.config)
        if unnamed:
            self.say(f"caches {', '.join(unnamed)} are not in --kv-config: full precision")


_running: KVCommand | None = None
_building: ContextVar[bool] = ContextVar("_building", default=False)
_templates: "list[tuple[weakref.ref[Any], int | None, KVConfig, list[Any]]]" = []


def running() -> KVCommand | None:
    """The command that this process runs; None in programs that use mlx-lm as a library."""
    return _running


@contextlib.contextmanager
def command(name: str) -> Iterator[KVCommand]:
    """Run a command within the block; what it asks for ends with it."""
    global _running
    before, _running = _running, KVCommand(name)
    try:
        yield _running
    finally:
        _running = before


def is_building() -> bool:
    """Whether our own code asks for caches, to see what the model has: it wants stock ones."""
    return _building.get()


def fresh_caches(model: Any, config: "KVConfig", max_kv_size: int | None) -> list[Any]:
    """Empty caches of a model; the first set is remembered and copied, so that all share their layouts.

    Raises:
        OptiqError: As :func:`mlx_optiq_ext.kv.build.build_caches`.
    """
    for known, known_size, known_config, caches in _templates:
        if known() is model and known_size == max_kv_size and known_config == config:
            return copy.deepcopy(caches)
    from mlx_optiq_ext.kv.build import build_caches  # deferred: needs mlx, and most commands never ask

    token = _building.set(True)
    try:
        caches = build_caches(model, config, max_kv_size)
    finally:
        _building.reset(token)
    _templates[:] = [known for known in _templates if known[0]() is not None]
    _templates.append((weakref.ref(model), max_kv_size, config, caches))
    return copy.deepcopy(caches)


def _has(refs: list[weakref.ref[Any]], model: Any) -> bool:
    return any(ref() is model for ref in refs)
