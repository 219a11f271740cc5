"""The seam of ``mlx_lm.convert``: the "optiq" recipe, its option group, and the way into our pipeline.

Stays light: it is imported whenever mlx-lm is. What a conversion needs is imported when "optiq" is chosen;
every other call reaches the stock function with the arguments as given.
"""

import argparse
import functools
import inspect
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from mlx_optiq_ext.errors import OptiqError, OutputExists, PatchConflict, UsageError
from mlx_optiq_ext.patches.bindings import rebind, replace
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable, require_list
from mlx_optiq_ext.stop import exit_code

__all__ = ["OPTION_PREFIX", "PATCH", "RECIPE"]

RECIPE = "optiq"
OPTION_PREFIX = "optiq-"
_KEYWORD_PREFIX = "optiq_"
_MARK = "_mlx_optiq_ext"
_PARAMETERS = (
    "hf_path",
    "mlx_path",
    "quantize",
    "q_group_size",
    "q_bits",
    "q_mode",
    "dtype",
    "upload_repo",
    "revision",
    "dequantize",
    "quant_predicate",
    "trust_remote_code",
)


def _apply(module: ModuleType) -> Undo:
    """Check the seam, then change it; on any failure the module is as it was."""
    recipes = require_list(module, "QUANT_RECIPES")
    convert = require_callable(module, "convert", _PARAMETERS)
    configure_parser = require_callable(module, "configure_parser")
    main = require_callable(module, "main")
    if RECIPE in recipes:
        raise PatchConflict(f"{module.__name__}.QUANT_RECIPES has {RECIPE!r} already, from someone else")
    stale = getattr(sys.modules.get("mlx_lm"), "convert", None)
    if hasattr(stale, _MARK):  # a reload gave the module new functions; the package kept the wrapped old one
        rebind(stale, convert)
    undo_names = replace(
        module,
        {
            "configure_parser": _wrap_configure_parser(configure_parser),
            "main": _wrap_main(main),
            "convert": _wrap_convert(convert),
        },
    )
    recipes.append(RECIPE)  # in place: the parser offers this very list

    def undo() -> None:
        undo_names()
        if RECIPE in recipes:
            recipes.remove(RECIPE)

    return undo


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, "convert", None), _MARK)


def _probe(module: ModuleType) -> str:
    """Ask the parser and the function for the recipe; stops at the output check, so nothing is converted."""
    words = ["--hf-path", "m", "--quant-predicate", RECIPE, "--optiq-target-bpw", "4.5"]
    try:
        with redirect_stderr(io.StringIO()):
            given = module.configure_parser().parse_args(words)
    except SystemExit:
        return f"the parser refuses {' '.join(words)}"
    if getattr(given, "optiq_target_bpw", None) != 4.5:
        return "the parser drops --optiq-target-bpw"
    for function in (module.convert, getattr(sys.modules.get("mlx_lm"), "convert", None)):
        try:
            function(hf_path="m", mlx_path=str(Path(__file__).parent), quant_predicate=RECIPE)  # type: ignore[misc]
        except OutputExists:
            continue
        except Exception as error:  # noqa: BLE001  whatever stock code raises, it was stock code
            return f"mlx_lm.convert does not reach our conversion: {error}"
    return ""


def _wrap_configure_parser(original: Any) -> Any:
    @functools.wraps(original)
    def configure_parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        from mlx_optiq_ext.formats.arguments import add_options  # deferred: only a command line needs it
        from mlx_optiq_ext.types.options import ConvertOptions

        parser: argparse.ArgumentParser = original(*args, **kwargs)
        group = parser.add_argument_group(
            f"--quant-predicate {RECIPE}",
            "Measure how much every tensor matters and spend bits accordingly (mlx-optiq-ext); implies -q. "
            "Without a target: 5.0 stored bits per weight.",
        )
        add_options(group, ConvertOptions, prefix=OPTION_PREFIX)
        parser.error = functools.partial(_refuse, parser, parser.error)  # type: ignore[method-assign]
        return parser

    return configure_parser


def _refuse(parser: argparse.ArgumentParser, stock: Any, message: str) -> NoReturn:
    """Answer a mistake in our options with the error alone; the usage of all of them would bury it."""
    if f"--{OPTION_PREFIX}" not in message:
        stock(message)
    parser.exit(UsageError.exit_code, f"{parser.prog}: error: {message}\n")


def _wrap_main(original: Any) -> Any:
    @functools.wraps(original)
    def main(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except OptiqError as error:
            print(f"mlx_lm.convert: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            if not (said := getattr(stop, "__notes__", ())):  # not in our conversion
                raise
            print(f"\nmlx_lm.convert: stopped; {'; '.join(said)}", file=sys.stderr)
            raise SystemExit(exit_code(stop)) from None

    return main


def _wrap_convert(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def convert(*args: Any, **kwargs: Any) -> Any:
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(_KEYWORD_PREFIX)}
        if not ours and not _asks_for_recipe(signature, args, kwargs):
            return original(*args, **kwargs)
        from mlx_optiq_ext.patches.convert_call import convert_call, run_call  # deferred: heavy

        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return run_call(convert_call(bound.arguments, ours))

    setattr(convert, _MARK, PATCH.name)
    return convert


def _asks_for_recipe(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        predicate = signature.bind(*args, **kwargs).arguments.get("quant_predicate")
    except TypeError:  # the stock function words this one
        return False
    return isinstance(predicate, str) and predicate == RECIPE


PATCH = Patch(
    name="convert-recipe",
    target="mlx_lm.convert",
    minimum=(0, 32),
    below=(0, 33),
    why="mlx_lm.convert --quant-predicate optiq measures the model and spends bits where they matter",
    apply=_apply,
    is_applied=_is_applied,
    probe=_probe,
)
