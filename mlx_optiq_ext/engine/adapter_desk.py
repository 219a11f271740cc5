"""Which adapters the models of this server have, whether they are loaded or not.

Finds adapter folders, remembers what to mount when a model comes back, and carries calls to the owner thread.
Called by ``engine``.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from mlx_optiq_ext.engine.adapters import check_adapter_name
from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.served import Loaded, ModelSpec
from mlx_optiq_ext.engine.settle import attempt, refuse, settle
from mlx_optiq_ext.errors import AdapterError, RequestError, UsageError
from mlx_optiq_ext.hub.adapters import fetch_adapter, is_hub_id
from mlx_optiq_ext.types.status import AdapterStatus

__all__ = ["AdapterDesk", "parse_adapters"]


class AdapterDesk:
    """Mounts and unmounts by name.

    Args:
        owner: Whose thread does it.
        folders: Where adapters may come from at run time, besides the Hub.
        given: Model → name → folder or Hub id, mounted when the model is loaded.
        changed: Called on the owner thread when something was mounted or taken away.
    """

    def __init__(
        self,
        owner: Owner,
        folders: Iterable[str],
        given: dict[str, dict[str, str]],
        changed: Callable[[], None],
    ) -> None:
        self._owner = owner
        self._changed = changed
        self._folders = [Path(folder).expanduser().resolve() for folder in folders]
        self._wanted: dict[str, dict[str, tuple[Path, str]]] = {
            model: {name: _given(name, source) for name, source in adapters.items()}
            for model, adapters in given.items()
        }

    def restore(self, loaded: Loaded) -> None:
        """Mount what the model should have and has not; on the owner thread."""
        for name, (folder, source) in self._wanted.get(loaded.spec.name, {}).items():
            if name not in loaded.adapters.names:
                loaded.adapters.add(name, folder, source)

    def mount(self, name: str, source: str, spec: ModelSpec) -> "Future[AdapterStatus]":
        """Find an adapter, on a thread of its own, and mount it."""
        check_adapter_name(name)
        future: Future[AdapterStatus] = Future()

        def mounted(folder: Path) -> AdapterStatus:
            loaded = self._owner.open(spec)
            try:
                loaded.adapters.add(name, folder, _shown(source))
                self._wanted.setdefault(spec.name, {})[name] = (folder, _shown(source))
            except AdapterError as error:
                # Who asked over HTTP learns what is wrong, not where folders are.
                raise AdapterError(str(error).replace(str(folder), _shown(source))) from error
            finally:
                self._owner.let_go(spec.name)
            self._changed()
            return next(each for each in loaded.adapters.status(spec.name) if each.name == name)

        def found() -> None:
            folder = self._find(source)
            self._owner.call(lambda: settle(future, lambda: mounted(folder)))

        threading.Thread(
            target=lambda: attempt(found, partial(refuse, future)), name="optiq-adapter", daemon=True
        ).start()
        return future

    def unmount(self, name: str, spec: ModelSpec) -> "Future[None]":
        """Take an adapter away."""

        def unmounted(loaded: Loaded) -> None:
            loaded.adapters.remove(name)
            self._wanted.get(spec.name, {}).pop(name, None)

        return self._with(spec, unmounted)

    def use(self, name: str | None, spec: ModelSpec) -> "Future[None]":
        """Set the default."""
        return self._with(spec, lambda loaded: loaded.adapters.use(name))

    def _with(self, spec: ModelSpec, action: Callable[[Loaded], None]) -> "Future[None]":
        future: Future[None] = Future()

        def run() -> None:
            loaded = self._owner.open(spec)
            try:
                self.restore(loaded)
                action(loaded)
            finally:
                self._owner.let_go(spec.name)
            self._changed()

        self._owner.call(lambda: settle(future, run))
        return future

    def _find(self, source: str) -> Path:
        """A folder that may be mounted from, or a Hub repository's.

        Raises:
            RequestError: A folder outside of those that are allowed, or none at all.
        """
        for allowed in self._folders:
            inside = (allowed / source).resolve()
            if inside.is_relative_to(allowed) and inside.is_dir():
                return inside
        if is_hub_id(source):
            return fetch_adapter(source)
        allowed_text = (
            "in one of --adapters-dir" if self._folders else "nowhere, for --adapters-dir was not given"
        )
        raise RequestError(
            f"{source[:120]!r} is no adapter folder {allowed_text}; give a folder there, or a Hub id "
            "ORGANISATION/NAME",
            param="source",
        )


def parse_adapters(words: Iterable[str], models: Iterable[str]) -> dict[str, dict[str, str]]:
    """``NAME=DIR`` or ``MODEL:NAME=DIR`` of ``--adapter``, by model; the first model where none is named.

    Raises:
        UsageError: One cannot be read, or names no model.
    """
    known = tuple(models)
    found: dict[str, dict[str, str]] = {}
    for word in words:
        left, equals, source = word.partition("=")
        model, colon, name = left.rpartition(":")
        model = model if colon else known[0]
        if not equals or not source or model not in known:
            raise UsageError(
                f"--adapter {word!r}: write NAME=DIR, or MODEL:NAME=DIR with one of {', '.join(known)}"
            )
        try:
            check_adapter_name(name)
        except RequestError as error:
            raise UsageError(f"--adapter {word!r}: {error}") from error
        found.setdefault(model, {})[name] = source
    return found


def _given(name: str, source: str) -> tuple[Path, str]:
    """The folder of an adapter, and what may be shown of where it is."""
    folder = Path(source).expanduser().resolve()
    if folder.is_dir():
        return folder, folder.name
    if is_hub_id(source):
        return fetch_adapter(source), source
    raise AdapterError(f"--adapter {name}={source}: no such folder, and no Hub id ORGANISATION/NAME")


def _shown(source: str) -> str:
    return source if is_hub_id(source) else Path(source).name
