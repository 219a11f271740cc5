"""Show what an adapter is: base, ranks by module, parameters, how it was made.

ADAPTER is a folder or a Hub id, in any form that is read: ours, mlx-lm's, the published package's, or PEFT's.
"""

import argparse
from pathlib import Path

import msgspec

from mlx_optiq_ext.cli.commands.report import terminal_text
from mlx_optiq_ext.cli.console import Console
from mlx_optiq_ext.errors import AdapterError
from mlx_optiq_ext.formats.adapter import AdapterForm, find_adapter
from mlx_optiq_ext.hub.adapters import resolve_adapter
from mlx_optiq_ext.hub.fingerprint import other_weights
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.lora.files import locate_factors, read_adapter
from mlx_optiq_ext.lora.report import adapter_report
from mlx_optiq_ext.models.load import load_model
from mlx_optiq_ext.types.adapter import AdapterConfig

__all__ = ["AdapterInfo", "add_arguments", "run"]


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints."""

    folder: str
    source: str
    """What it was called: the folder, or a Hub id."""
    form: AdapterForm
    num_parameters: int
    nbytes: int
    """Of the factors."""
    fits: bool | None = None
    """Whether it fits ``--model``; None where none was given."""
    remark: str = ""
    """Why it does not fit, or that it was made for other weights of the same shapes."""
    config: AdapterConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq lora info``."""
    parser.add_argument("adapter", metavar="ADAPTER", help="Hub repository or folder of the adapter.")
    parser.add_argument("--model", metavar="MODEL", help="Also say whether it fits this model.")


def run(args: argparse.Namespace) -> int:
    """Read, check, show."""
    console = Console.from_args(args)
    folder = resolve_adapter(args.adapter)
    form = find_adapter(folder).form
    adapter = read_adapter(folder)
    damaged = [path for path, factors in adapter.factors.items() if not factors.is_finite()]
    if damaged:
        raise AdapterError(
            f"{args.adapter}: the factors of {damaged[0]} are not finite; train the adapter again"
        )
    fits, remark = None, ""
    if args.model is not None:
        ref = resolve_model(args.model, progress=console.progress)
        try:
            locate_factors(adapter, load_model(ref)[0])
            fits = True
        except AdapterError as error:
            fits, remark = False, str(error)
        base = adapter.config.base
        if fits and base is not None and base.sha256:
            remark = other_weights(base, ref)
    parameters = {path: factors.num_parameters for path, factors in adapter.factors.items()}
    info = AdapterInfo(
        folder=str(folder),
        source=args.adapter,
        form=form,
        num_parameters=sum(parameters.values()),
        nbytes=sum(factors.a.nbytes + factors.b.nbytes for factors in adapter.factors.values()),
        fits=fits,
        remark=remark,
        config=adapter.config,
    )
    facts: list[tuple[str, str]] = [("form", form)]
    if fits is not None:
        verdict = "yes" if fits else "no"
        facts.append((f"fits {args.model}", f"{verdict}: it {remark}" if fits and remark else verdict))
    if fits is False:
        facts.append(("because", remark))
    report = adapter_report(f"{_name(args.adapter)}: adapter", adapter.config, parameters, facts)
    console.result(info, terminal_text(report, is_terminal=console.out.isatty()))
    return 0


def _name(source: str) -> str:
    """A folder's own name, however it was given; a Hub id as it is."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source
