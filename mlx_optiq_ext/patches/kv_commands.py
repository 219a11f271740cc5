"""The seams of ``mlx_lm.generate``, ``chat``, ``server`` and ``cache_prompt``: our KV options.

Each command's parser gets the options, its ``main`` the storage that they name and our errors as one line.
Where a command has a draft model, that model is noted, because it may do without.
"""

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mlx_optiq_ext.errors import OptiqError, PatchConflict, PatchUnsupported
from mlx_optiq_ext.patches.bindings import replace
from mlx_optiq_ext.patches.kv_command import command, running
from mlx_optiq_ext.patches.kv_options import with_kv_options
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable

__all__ = ["PATCHES"]

_MARK = "_mlx_optiq_ext"
_SPECULATE = "speculative_generate_step"


def _apply_generate(module: ModuleType) -> Undo:
    speculate = require_callable(module, _SPECULATE, ("prompt", "model", "draft_model"))
    return _apply_names(module, {_SPECULATE: _noting_draft(speculate)}, opens_caches=True)


def _apply_plain(module: ModuleType) -> Undo:
    return _apply_names(module, {}, opens_caches=False)


def _apply_names(module: ModuleType, others: dict[str, Any], *, opens_caches: bool) -> Undo:
    """Wrap ``setup_arg_parser`` and ``main``, and put ``others`` in place."""
    setup = require_callable(module, "setup_arg_parser")
    main = require_callable(module, "main")

    @functools.wraps(setup)
    def setup_arg_parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        return with_kv_options(setup(*args, **kwargs), opens_caches=opens_caches)

    wrapped = {"setup_arg_parser": setup_arg_parser, "main": _wrap_main(main, module.__name__)}
    return replace(module, wrapped | others)


def _apply_server(module: ModuleType) -> Undo:
    """The server builds its parser inside of ``main``: it is shown an argparse that adds our options."""
    main = require_callable(module, "main")
    provider = getattr(module, "ModelProvider", None)
    load = vars(provider).get("_load") if isinstance(provider, type) else None
    if not callable(load) or getattr(module, "argparse", None) is not argparse:
        raise PatchUnsupported(
            f"{module.__name__} is not what the patch needs: no ModelProvider._load, or no argparse; "
            "`mlx_lm.generate` and `mlx_lm.chat` do not depend on it"
        )
    shown, noting = _Argparse("argparse"), _noting_loaded_draft(load)
    undo_main = replace(module, {"main": _wrap_main(main, module.__name__)})
    module.argparse = shown  # type: ignore[attr-defined]
    provider._load = noting  # type: ignore[union-attr]

    def undo() -> None:
        if module.argparse is not shown or vars(provider).get("_load") is not noting:
            raise PatchConflict(
                f"{module.__name__}.argparse or ModelProvider._load was replaced by someone else after us; "
                "undo that change first, or start a new process with MLX_OPTIQ_DISABLE=1"
            )
        undo_main()
        module.argparse = argparse  # type: ignore[attr-defined]
        provider._load = load  # type: ignore[union-attr]

    return undo


class _Argparse(ModuleType):
    """argparse, whose parsers have our options."""

    def __getattr__(self, name: str) -> Any:
        return _parser if name == "ArgumentParser" else getattr(argparse, name)


def _parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
    return with_kv_options(argparse.ArgumentParser(*args, **kwargs), opens_caches=False)


def _wrap_main(original: Any, name: str) -> Any:
    @functools.wraps(original)
    def main(*args: Any, **kwargs: Any) -> Any:
        try:
            with command(name):
                return original(*args, **kwargs)
        except OptiqError as error:
            print(f"{name}: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None

    setattr(main, _MARK, name)
    return main


def _noting_draft(original: Any) -> Any:
    @functools.wraps(original)
    def speculative_generate_step(
        prompt: Any, model: Any, draft_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked = running()
        if asked is not None:
            asked.note_draft(draft_model)
        return original(prompt, model, draft_model, *args, **kwargs)

    return speculative_generate_step


def _noting_loaded_draft(original: Any) -> Any:
    @functools.wraps(original)
    def _load(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(self, *args, **kwargs)
        asked, draft = running(), getattr(self, "draft_model", None)
        if asked is not None and draft is not None:
            asked.note_draft(draft)
        return loaded

    return _load


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, "main", None), _MARK)


def _probe(module: ModuleType) -> str:
    """Let the command print its help, the one thing that it does with its real parser and nothing else."""
    said, words = io.StringIO(), sys.argv
    sys.argv = [module.__name__, "--help"]
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = words
    missing = [flag for flag in ("--kv-config", "--kv-recent") if flag not in said.getvalue()]
    return f"its --help lacks {' and '.join(missing)}" if missing else ""


def _patch(name: str, apply: Callable[[ModuleType], Undo]) -> Patch:
    return Patch(
        name=f"kv-{name.replace('_', '-')}",
        target=f"mlx_lm.{name}",
        minimum=(0, 32),
        below=(0, 33),
        why=f"mlx_lm.{name} --kv-config FILE stores its KV cache in mixed precision.",
        apply=apply,
        is_applied=_is_applied,
        probe=_probe,
    )


PATCHES: tuple[Patch, ...] = (
    _patch("generate", _apply_generate),
    _patch("chat", _apply_plain),
    _patch("cache_prompt", _apply_plain),
    _patch("server", _apply_server),
)
"""One per command."""
