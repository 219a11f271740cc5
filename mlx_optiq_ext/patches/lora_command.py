"""The seam of ``mlx_lm.lora``: our options for ranks, and adapters stored in both forms.

Without them the command is stock to the last byte it writes. Stays light: it is imported whenever
``mlx_lm.lora`` is.
"""

import argparse
import functools
import io
import sys
from contextlib import redirect_stderr
from types import ModuleType
from typing import Any

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.patches.bindings import replace
from mlx_optiq_ext.patches.patch import Patch, Undo, require_callable

__all__ = ["PATCH", "say"]

_MARK = "_mlx_optiq_ext"
_SCALINGS = ("by_sensitivity", "by_bits", "constant")


def say(text: str) -> None:
    """One line on stderr, as the command's own."""
    print(f"mlx_lm.lora: {text}", file=sys.stderr)


def _apply(module: ModuleType) -> Undo:
    build = require_callable(module, "build_parser")
    train = require_callable(module, "train_model", ("args", "model"))
    main = require_callable(module, "main")
    return replace(
        module,
        {
            "build_parser": _wrap_build_parser(build),
            "train_model": _wrap_train_model(train),
            "main": _wrap_main(main),
        },
    )


def _is_applied(module: ModuleType) -> bool:
    return hasattr(getattr(module, "train_model", None), _MARK)


def _probe(module: ModuleType) -> str:
    words = ["--optiq-rank-scaling", "by_bits"]
    try:
        with redirect_stderr(io.StringIO()):
            given = module.build_parser().parse_args(words)
    except SystemExit:
        return f"the parser refuses {' '.join(words)}"
    return "" if getattr(given, "optiq_rank_scaling", None) == "by_bits" else f"the parser drops {words[0]}"


def _wrap_build_parser(original: Any) -> Any:
    @functools.wraps(original)
    def build_parser(*args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = original(*args, **kwargs)
        group = parser.add_argument_group(
            "ranks by measurement (mlx-optiq-ext)",
            "The rank of lora_parameters is what a module has on average; the adapter is stored with the "
            "ranks as they are and, for stock mlx-lm, padded to one.",
        )
        # What is not given leaves no trace in adapter_config.json.
        group.add_argument(
            "--optiq-rank-scaling",
            choices=_SCALINGS,
            default=argparse.SUPPRESS,
            help="by_sensitivity: more rank where the output is sensitive, at as many parameters as the "
            "constant rank; by_bits: the published rule, more rank where there are more bits, not where the "
            "error is; constant: one rank.",
        )
        group.add_argument(
            "--optiq-sensitivity",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="Sensitivity file of the base, where it is not in the model's folder.",
        )
        group.add_argument(
            "--optiq-max-parameters",
            metavar="COUNT",
            type=int,
            default=argparse.SUPPRESS,
            help="Ceiling of the adapter's parameters.",
        )
        return parser

    return build_parser


def _wrap_train_model(original: Any) -> Any:
    @functools.wraps(original)
    def train_model(args: Any, model: Any, *rest: Any, **named: Any) -> Any:
        given = [name for name in vars(args) if name.startswith("optiq_") and vars(args)[name] is not None]
        if not given:
            return original(args, model, *rest, **named)
        if "optiq_rank_scaling" not in given:
            raise UsageError(f"--{given[0].replace('_', '-')} needs --optiq-rank-scaling")
        from mlx_optiq_ext.patches.lora_call import train  # deferred: heavy

        return train(functools.partial(original, args, model, *rest, **named), args, model)

    setattr(train_model, _MARK, PATCH.name)
    return train_model


def _wrap_main(original: Any) -> Any:
    @functools.wraps(original)
    def main(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except OptiqError as error:
            say(f"error: {error}")
            raise SystemExit(error.exit_code) from None

    return main


PATCH = Patch(
    name="lora-command",
    target="mlx_lm.lora",
    minimum=(0, 32),
    below=(0, 33),
    why="mlx_lm.lora --optiq-rank-scaling gives every module a rank of its own",
    apply=_apply,
    is_applied=_is_applied,
    probe=_probe,
)
