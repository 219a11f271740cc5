"""Let stock mlx-lm commands know what we add to them: one finder that waits for the modules we extend.

Runs in every Python start (``mlx_optiq_ext.pth``), hence needs nothing but ``sys`` and ``os``, which are
loaded anyway. Knows which modules are extended, not how: that is ``patches/``, imported once mlx-lm is.
"""

import os
import sys

TYPE_CHECKING = False  # the name type checkers know, without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

__all__ = ["SEAMS", "install", "run_as_script", "uninstall"]

SEAMS = frozenset(
    {
        "mlx_lm.cache_prompt",
        "mlx_lm.chat",
        "mlx_lm.convert",
        "mlx_lm.generate",
        "mlx_lm.lora",
        "mlx_lm.models.base",
        "mlx_lm.models.cache",
        "mlx_lm.server",
        "mlx_lm.tuner.utils",
    }
)
"""Modules that have a patch; a test compares this with ``patches.registry.PATCHES``."""

_told: list[str] = []
"""Modules that a line on stderr said were left as they are."""


def install(*, explicit: bool = False) -> None:
    """Put the finder in front and extend what is loaded already. Idempotent.

    Args:
        explicit: The caller wants the extension and nothing less: a patch that does not fit raises.
    Raises:
        PatchError: A patch does not fit, and ``explicit`` or ``MLX_OPTIQ_STRICT=1`` is set.

    With ``MLX_OPTIQ_DISABLE=1`` in the environment nothing happens.
    """
    if _is_set("MLX_OPTIQ_DISABLE"):
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    misfit = None
    for name in sorted(SEAMS & sys.modules.keys()):
        try:
            _extend(name, strict=explicit)
        except Exception as error:  # noqa: BLE001  raised below: what fits is extended all the same
            misfit = misfit or error
    if misfit is not None:
        raise misfit


def uninstall() -> None:
    """Take the finder out and undo every patch of this process."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    _told.clear()
    registry = sys.modules.get("mlx_optiq_ext.patches.registry")
    if registry is not None:
        registry.revert_all()


def run_as_script(name: str, namespace: "dict[str, Any]") -> None:
    """Do what ``python -m NAME`` means, for a module whose patched form sits in ``sys.modules``.

    runpy executes a module's code a second time, in a namespace that no patch reaches. The code it gets
    from us leads here instead.

    Args:
        name: The module.
        namespace: Globals that runpy prepared.
    """
    from importlib import import_module  # deferred: start-up stays free of it

    module = import_module(name)
    loader: Any = module.__spec__ and module.__spec__.loader
    code = loader.inner.get_code(name) if isinstance(loader, _Loader) else loader.get_code(name)
    registry = sys.modules.get("mlx_optiq_ext.patches.registry")
    if namespace.get("__name__") != "__main__" or registry is None or not registry.is_active(name):
        exec(code, namespace)
        return
    for notice in code.co_consts:
        # What the module says only when run this way, such as that the spelling is deprecated.
        if isinstance(notice, str) and "deprecated" in notice:
            print(notice)
    module.main()


class _Finder:
    """Finds the modules in :data:`SEAMS` by asking the other finders; knows no other module."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in SEAMS or fullname in self._busy:
            return None
        self._busy.add(fullname)  # another finder may ask the whole chain again
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._busy.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def _ask_others(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None


class _Loader:
    """The real loader, and our patch once the module has run; every other attribute is the real one's."""

    def __init__(self, inner: "Any") -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> "Any":
        if name == "inner":  # copied without __init__: no endless search
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        create = getattr(self.inner, "create_module", None)
        module: ModuleType | None = create(spec) if create else None
        return module

    def exec_module(self, module: "ModuleType") -> None:
        if _wants_recipe():
            _load_blas()
        self.inner.exec_module(module)
        _extend(module.__name__)

    def get_code(self, name: str) -> "CodeType":
        call = f"__import__('mlx_optiq_ext._hook', fromlist=['*']).run_as_script({name!r}, globals())"
        return compile(call, "<mlx_optiq_ext>", "exec")


def _extend(name: str, *, strict: bool = False) -> None:
    """Apply the patches of a loaded module, or leave it untouched and say so where somebody waits for it."""
    try:
        from mlx_optiq_ext.patches import registry  # deferred: needs msgspec

        registry.apply_to(name)
    except Exception as error:  # a border: mlx-lm must import whatever state we are in
        if strict or _is_set("MLX_OPTIQ_STRICT"):
            raise
        if _asked_for(name) and not _told:
            _told.append(name)  # what keeps one module as it is mostly keeps all of them so
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"mlx-optiq-ext: {name} was left as it is: {text}", file=sys.stderr)


def _load_blas() -> None:
    """Load a fast BLAS while MLX is not loaded yet; never for stock recipes, whose bits must not change."""
    from mlx_optiq_ext.blas import preload_blas  # deferred: ctypes is not needed in every start

    preload_blas()


def _asked_for(name: str) -> bool:
    """Whether the command line of this process wants what we add to this module."""
    if any(word.startswith("--optiq-rank-scaling") for word in getattr(sys, "argv", [])[1:]):
        return name in ("mlx_lm.lora", "mlx_lm.tuner.utils")
    if _wants_recipe():
        return name == "mlx_lm.convert" or _is_ours()
    options = ("--kv-config", "--kv-recent")
    return any(word.startswith(options) for word in getattr(sys, "argv", [])[1:])


def _wants_recipe() -> bool:
    """Whether the command line of this process wants the recipe, or is ours."""
    words = getattr(sys, "argv", [])[1:]
    return _is_ours() or any(
        word == "optiq" or word.endswith("=optiq") or word.startswith("--optiq-") for word in words
    )


def _is_ours() -> bool:
    argv = getattr(sys, "argv", [])
    return bool(argv) and os.path.basename(argv[0]).startswith("optiq")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")
