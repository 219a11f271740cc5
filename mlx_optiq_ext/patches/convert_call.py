"""One call of mlx-lm's ``convert`` with the "optiq" recipe, translated into our own conversion.

Knows the parameters of ``mlx_lm.convert.convert``; imports mlx only to run. Called by ``convert_recipe``.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import OutputExists, UsageError
from mlx_optiq_ext.formats.arguments import option_names, options_from
from mlx_optiq_ext.formats.atomic import require_writable
from mlx_optiq_ext.progress_line import ProgressLine
from mlx_optiq_ext.stop import clean_stop
from mlx_optiq_ext.types.options import ConvertOptions
from mlx_optiq_ext.types.quant import Choice

__all__ = ["DEFAULT_TARGET_BPW", "ConvertCall", "convert_call", "run_call"]

DEFAULT_TARGET_BPW = 5.0
_TARGETS = ("target_bpw", "target_size", "fit")


class ConvertCall(msgspec.Struct, frozen=True, kw_only=True):
    """What to convert, where to, and how."""

    source: str
    out: str
    options: ConvertOptions
    given: tuple[str, ...] = ()
    """Options that the caller set."""


def convert_call(stock: Mapping[str, Any], ours: Mapping[str, Any]) -> ConvertCall:
    """Translate and check a call; nothing is loaded or written.

    ``q_group_size`` becomes the candidate groups, ``q_bits`` the target (the stored size of uniform
    ``q_bits``); ``dtype``, ``upload_repo``, ``revision``, ``trust_remote_code`` are ours of the same name.

    Args:
        stock: Every parameter of ``mlx_lm.convert.convert``, defaults filled in.
        ours: ``optiq_*`` keywords.
    Returns:
        The call; the target is 5.0 bpw where none is given.
    Raises:
        TypeError: An ``optiq_*`` keyword does not exist.
        OutputExists: The output folder is there.
        UsageError: A value is out of bounds, two arguments contradict each other, or one makes no sense
            with this recipe.
    """
    if stock["quant_predicate"] != "optiq":
        raise UsageError(f"{_flag(next(iter(ours)))} needs --quant-predicate optiq")
    if not stock["hf_path"]:
        raise UsageError("no model given; name a folder or Hub repository with --hf-path")
    if Path(stock["mlx_path"]).exists():
        raise OutputExists(f"{stock['mlx_path']} exists already; remove it or choose another --mlx-path")
    require_writable(Path(stock["mlx_path"]))
    if stock["dequantize"]:
        raise UsageError("--dequantize and --quant-predicate optiq contradict each other; give one")
    if stock["q_mode"] != "affine":
        raise UsageError(
            f"--q-mode {stock['q_mode']} does not go with --quant-predicate optiq; offer the mode as a "
            f"choice instead: --optiq-candidate-bits 4,6,8,{stock['q_mode']}"
        )
    merged = _merged(stock, ours)
    options = {f"optiq_{name}": value for name, value in merged.items()}
    return ConvertCall(
        source=str(stock["hf_path"]),
        out=str(stock["mlx_path"]),
        options=options_from(argparse.Namespace(**options), ConvertOptions, prefix="optiq-"),
        given=tuple(merged),
    )


def run_call(call: ConvertCall) -> None:
    """Measure, allocate, convert and verify, with progress on stderr.

    Raises:
        OptiqError: See ``convert.model.convert_model``.
    """
    from mlx_optiq_ext.convert.model import convert_model  # deferred: huggingface-hub and mlx are heavy
    from mlx_optiq_ext.hub.resolve import resolve_model

    measure = call.options.measure
    with clean_stop(), _resumable(), ProgressLine(prefix="[optiq] ") as progress:
        reference = resolve_model(
            call.source, measure.revision, progress, trust_remote_code=measure.trust_remote_code
        )
        result = convert_model(reference, call.options, Path(call.out), progress=progress, given=call.given)
    for note in result.notes:
        print(f"[WARNING] {note}", file=sys.stderr)
    print(f"[INFO] Wrote {call.out} with {result.allocation.achieved_bpw:.3f} bits per weight.")


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Note on a stop that the conversion can go on, where it says nothing itself."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", ()):
            stop.add_note("run the same command again to go on from here")
        raise


def _merged(stock: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Our options by field name, stock arguments included."""
    known = option_names(ConvertOptions)
    options: dict[str, Any] = {}
    for keyword, value in ours.items():
        name = keyword.removeprefix("optiq_")
        if name not in known:
            raise TypeError(f"convert() got an unexpected keyword argument {keyword!r}")
        options[name] = [value] if name == "pin" and isinstance(value, str) else value
    for name in ("dtype", "upload_repo", "revision"):
        _put(options, name, stock[name], f"--{name.replace('_', '-')}")
    if stock["trust_remote_code"]:
        options["trust_remote_code"] = True
    if stock["q_group_size"] is not None:
        _put(options, "candidate_groups", str(stock["q_group_size"]), "--q-group-size")
    given = [name for name in _TARGETS if options.get(name) is not None]
    if stock["q_bits"] is not None:
        if given:
            raise UsageError(
                f"--q-bits {stock['q_bits']} and {_flag(given[0])} both set the target; give one"
            )
        uniform = Choice.parse(f"{stock['q_bits']}g{stock['q_group_size'] or 64}")
        options["target_bpw"] = uniform.bpw()
    elif not given and not options.get("allocation"):
        options["target_bpw"] = DEFAULT_TARGET_BPW
    return options


def _put(options: dict[str, Any], name: str, value: Any, stock_flag: str) -> None:
    if value is None:
        return
    if options.get(name, value) != value:
        raise UsageError(f"{stock_flag} {value} and {_flag(name)} {options[name]} differ; give one")
    options[name] = value


def _flag(name: str) -> str:
    return f"--optiq-{name.removeprefix('optiq_').replace('_', '-')}"
