"""Measure what fewer bits cost, for every tensor of a model.

MODEL is a Hugging Face repository or a folder with unquantized weights. The sensitivity file that is
written serves every budget: see `optiq allocate` and `optiq convert --sensitivity`. A stopped measurement
goes on where it was when the same command is given again.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent_file
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.hub.fingerprint import fingerprint
from mlx_optiq_ext.hub.resolve import resolve_model
from mlx_optiq_ext.measure.domains import DomainAgreement, domain_rank_correlation
from mlx_optiq_ext.quant.journal import discard_journal
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity
from mlx_optiq_ext.types.model import ModelRef
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import SensitivityTable

__all__ = ["add_arguments", "render", "run"]

_SHOWN = 10
_AGREES = 0.8
"""Rank correlation from which on it hardly matters which of two domains is calibrated on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq measure``."""
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder.")
    parser.add_argument(
        "-o", "--out", metavar="FILE", default="sensitivity.json", help="Sensitivity file to write."
    )
    parser.add_argument(
        "--force", action="store_true", help="Replace a file of another model that is already there."
    )
    add_options(parser, MeasureOptions)


def run(args: argparse.Namespace) -> int:
    """Measure, write the sensitivity file, and show where the model is sensitive."""
    console = Console.from_args(args)
    options = options_from(args, MeasureOptions)
    ref = resolve_model(
        args.model, options.revision, progress=console.progress, trust_remote_code=options.trust_remote_code
    )
    out = Path(args.out)
    require_absent_file(out, force=args.force or _is_of_model(out, ref))
    journal = out.with_name(f".{out.name}.journal")
    table = measure_sensitivity(ref, options, journal_file=journal, progress=console.progress)
    write_sensitivity(out, table)
    discard_journal(journal)
    console.note(f"sensitivity file written to {out}")
    for note in table.notes:
        console.note(f"note: {note}")
    console.result(table, render(table))
    return 0


def render(table: SensitivityTable) -> str:
    """Totals per choice, the costliest tensors, and how far the domains agree."""
    parts = [_totals(table), _costliest(table)]
    if len(table.domains) > 1:
        parts.append(_agreement(table))
    return "\n\n".join(parts)


def _is_of_model(file: Path, ref: ModelRef) -> bool:
    """Whether a file is a sensitivity file of this very model, which measuring again may replace."""
    try:
        return file.is_file() and read_sensitivity(file).model.sha256 == fingerprint(ref).sha256
    except UsageError:
        return False


def _totals(table: SensitivityTable) -> str:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for probe in table.probes:
        entry = sums[probe.choice.label]
        entry[0] += probe.divergence
        entry[1] += 1
    numel = {unit.path: unit.numel for unit in table.units}
    shown = sorted({p.choice for p in table.probes}, key=lambda c: c.bpw(table.float_bits))
    rows = [
        (
            choice.label,
            f"{choice.bpw(table.float_bits):.2f}",
            str(int(sums[choice.label][1])),
            f"{sum(numel[p.path] for p in table.probes if p.choice == choice) / 1e6:.1f} M",
            f"{sums[choice.label][0]:.4g}",
        )
        for choice in shown
    ]
    return format_table(("choice", "bpw", "tensors", "weights", "summed divergence"), rows)


def _costliest(table: SensitivityTable) -> str:
    choice = _common_choice(table)
    probes = sorted((p for p in table.probes if p.choice.label == choice), key=lambda p: -p.divergence)
    rows = [(p.path, f"{p.divergence:.3g} ± {p.stderr:.1g}") for p in probes[:_SHOWN]]
    return format_table((f"costliest at {choice}", "divergence ± standard error over windows"), rows)


def _common_choice(table: SensitivityTable) -> str:
    counts: dict[str, int] = defaultdict(int)
    for probe in table.probes:
        if probe.choice.mode == "affine":
            counts[probe.choice.label] += 1
    return min(counts, key=lambda label: (-counts[label], abs(int(label.split("g")[0]) - 4)), default="keep")


def _agreement(table: SensitivityTable) -> str:
    """Rank correlation between domains at the choice that most tensors have, and where it is least."""
    found = domain_rank_correlation(table)
    if not found:
        return f"domains not compared: fewer than 3 tensors were measured in all {len(table.domains)} of them"
    label = _common_choice(table)
    picked = next((c for c in found if c.choice.label == label), found[0])
    matrix = [
        (name, *(f"{value:.2f}" for value in row))
        for name, row in zip(table.domains, picked.matrix, strict=True)
    ]
    title = f"how far domains agree on the order of tensors ({picked.choice.label}, Spearman)"
    shown = format_table(("", *(name[:9] for name in table.domains)), matrix, title)
    return f"{shown}\n{_disagreement(picked)}"


def _disagreement(agreement: DomainAgreement) -> str:
    """The pair that agrees least, the odd one out, and what that means."""
    first, second = agreement.worst_pair
    lines = [f"least agreement: {first} and {second}, {agreement.worst:.2f}"]
    odd = min(range(len(agreement.domains)), key=lambda i: agreement.with_rest[i])
    lines.append(f"furthest from the others: {agreement.domains[odd]}, {agreement.with_rest[odd]:.2f}")
    if not agreement.worst >= _AGREES:
        lines.append(
            "bits chosen for some of these domains suit others less: calibrate on what the model is for"
        )
    return "\n".join(lines)
