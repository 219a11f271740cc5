"""Choose bits for every tensor from a sensitivity file.

Needs no model: any number of budgets can be tried in seconds. TABLE is a file made by `optiq measure`, a
folder that has one, or a file of the published package.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.allocate.kv_memory import kv_bytes_per_token
from mlx_optiq_ext.allocate.prediction import predicted_as, prediction_text
from mlx_optiq_ext.allocate.size import format_nbytes
from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.allocation import write_allocation
from mlx_optiq_ext.formats.arguments import add_options, options_from
from mlx_optiq_ext.formats.atomic import require_absent_file
from mlx_optiq_ext.formats.score import read_score
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.types.figures import plus_minus
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, Pin, SensitivityTable
from mlx_optiq_ext.types.score import SCORE_FILE, ScoreReport

__all__ = ["add_arguments", "render", "run"]

_SHOWN_UNIFORM = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``optiq allocate``."""
    parser.add_argument("table", metavar="TABLE", help="Sensitivity file, or a folder that has one.")
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="Write the bit map with its prediction here (JSON)."
    )
    parser.add_argument("--force", action="store_true", help="Replace a bit map that is already there.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="The model's config.json, for --fit; default: that of the measured folder.",
    )
    add_options(parser, AllocateOptions)


def run(args: argparse.Namespace) -> int:
    """Allocate, write the bit map where asked for, and show what was chosen."""
    console = Console.from_args(args)
    options = options_from(args, AllocateOptions)
    if args.out:
        require_absent_file(Path(args.out), force=args.force)
    table = read_sensitivity(args.table)
    kv_bytes = None
    if options.fit is not None:
        config = _read_config(args.config, table)
        kv_bytes = kv_bytes_per_token(config, options.context, float_bits=table.float_bits)
    allocation = allocate(table, options, kv_bytes_per_token=kv_bytes)
    if args.out:
        write_allocation(args.out, allocation)
        console.note(f"bit map written to {args.out}")
    for note in table.notes:
        console.note(f"note: {note}")
    console.result(allocation, render(allocation, table, _score_beside(Path(args.table))))
    return 0


def render(allocation: Allocation, table: SensitivityTable, score: ScoreReport | None = None) -> str:
    """The allocation for people: choices, prediction, uniform rows within the same bits, pins.

    Args:
        allocation: What was chosen.
        table: What it was chosen from.
        score: Measurements of the same model; shown apart from predictions, with which they share nothing.
    """
    parts = [
        format_table(("choice", "tensors", "weights", "share", "bpw"), _choice_rows(allocation, table)),
        _summary(allocation, table),
    ]
    if table.method != "static":
        parts.append(_comparison(allocation, table))
    if score is not None:
        parts.append(_measured(score))
    if allocation.pins:
        parts.append(_pin_table(allocation.pins))
    return "\n\n".join(parts)


def _choice_rows(allocation: Allocation, table: SensitivityTable) -> list[tuple[str, ...]]:
    """Per choice: how many tensors and weights have it; last what is no unit."""
    tensors: dict[str, int] = {}
    weights: dict[str, int] = {}
    bpw: dict[str, float] = {}
    for unit in table.units:
        choice = allocation.bit_map.choices[unit.path]
        bpw[choice.label] = choice.bpw(table.float_bits)
        tensors[choice.label] = tensors.get(choice.label, 0) + len(unit.paths)
        weights[choice.label] = weights.get(choice.label, 0) + unit.numel
    rows: list[tuple[str, ...]] = [
        (
            label,
            str(tensors[label]),
            f"{weights[label]:,}",
            f"{weights[label] / table.total_numel:.1%}",
            f"{bpw[label]:.3f}",
        )
        for label in sorted(bpw, key=lambda label: (bpw[label], label))
    ]
    rest = table.total_numel - sum(weights.values())
    if rest > 0:
        rows.append(
            (
                "not quantizable",
                "–",
                f"{rest:,}",
                f"{rest / table.total_numel:.1%}",
                f"{table.fixed_bits / rest:.3f}",
            )
        )
    return rows


def _summary(allocation: Allocation, table: SensitivityTable) -> str:
    """Size, budget, prediction, worst domain, correction: one line each."""
    lines = [
        f"{allocation.achieved_bpw:.3f} bits per weight of at most {allocation.target_bpw:.3f}, all counted: "
        f"{format_nbytes(allocation.nbytes)}"
    ]
    if allocation.budget and not allocation.budget.startswith("--target-bpw"):
        lines.append(allocation.budget)
    if table.method == "static":
        return "\n".join([*lines, "no prediction: the static method ranks tensors by shape"])
    lines += [
        f"predicted KL {prediction_text(allocation.predicted_divergence, table)}",
        f"no allocation within this budget is predicted below {allocation.lower_bound:.4g} "
        f"({allocation.solver} solver)",
    ]
    if allocation.worst_domain:
        worst = f"{allocation.worst_domain_divergence:.4g}"
        lines.append(f"worst domain {allocation.worst_domain}: predicted {worst}")
    if table.correction != "none":
        lines.append(f"measured with {table.correction} correction; convert with the same")
    return "\n".join(lines)


def _comparison(allocation: Allocation, table: SensitivityTable) -> str:
    """This allocation, the best uniform choices within its bits and the next one above, by bits."""
    own = allocation.predicted_divergence
    within = [row for row in allocation.uniform if row[1] <= allocation.target_bpw]
    above = [row for row in allocation.uniform if row[1] > allocation.target_bpw]
    best = sorted(within, key=lambda row: row[2])[:_SHOWN_UNIFORM]
    rounding = "plain" if table.correction == "none" else table.correction
    rows = [("this allocation", f"{allocation.achieved_bpw:.3f}", f"{own:.4g}", "1.00")]
    rows += [
        (
            f"uniform {label}, {rounding} rounding",
            f"{bpw:.3f}",
            f"{divergence:.4g}",
            f"{divergence / own:.2f}" if own > 0 else "–",
        )
        for label, bpw, divergence in sorted([*best, *above[:1]], key=lambda row: (row[1], row[0]))
    ]
    title = f"all {predicted_as(table.correction)}"
    if table.correction != "none":
        title += " (stock mlx-lm rounds plainly: optiq score measures that)"
    return format_table(("stored as", "bpw", "predicted KL", "× this, predicted"), rows, title)


def _measured(score: ScoreReport) -> str:
    """What was measured of the same model on held-out text."""
    rows = [
        (
            f"{row.label}, plain rounding" if row.role == "uniform" else row.label,
            f"{row.bpw:.3f}",
            plus_minus(row.divergence, row.divergence_half_width),
        )
        for row in score.rows
        if row.role != "reference"
    ]
    return format_table(("stored as", "bpw", "KL ± 95 %"), rows, f"measured on held-out text ({SCORE_FILE})")


def _score_beside(table: Path) -> ScoreReport | None:
    """The score record of the folder that the sensitivity file is in, where it has one."""
    file = (table if table.is_dir() else table.absolute().parent.parent) / SCORE_FILE
    return read_score(file) if file.is_file() else None


def _pin_table(pins: tuple[Pin, ...]) -> str:
    """One row per reason and choice with what it costs; every single pin is in the JSON document."""
    groups: dict[tuple[str, str], list[Pin]] = {}
    for pin in pins:
        groups.setdefault((pin.reason, pin.choice.label), []).append(pin)
    rows = [
        (reason, label, str(len(group)), f"{_cost(group):.3g}", f"{_kilobytes(group):+,.1f}", group[0].path)
        for (reason, label), group in sorted(groups.items(), key=lambda entry: -_cost(entry[1]))
    ]
    plural = "" if len(pins) == 1 else "s"
    cost = f"predicted {_cost(pins):.3g} nats per token"
    title = f"pinned: {len(pins)} tensor{plural}, together {cost} at this budget"
    return format_table(("reason", "choice", "tensors", "nats", "kB", "such as"), rows, title)


def _cost(pins: Sequence[Pin]) -> float:
    return sum(pin.cost_divergence for pin in pins)


def _kilobytes(pins: Sequence[Pin]) -> float:
    return sum(pin.cost_bits for pin in pins) / 8000


def _read_config(given: str | None, table: SensitivityTable) -> dict[str, Any]:
    """config.json for --fit: the one named, else that of the measured folder.

    Raises:
        UsageError: Neither is there, or it is not JSON.
    """
    file = Path(given) if given else Path(table.model.source or ".") / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"--fit needs the model's config.json and {file} cannot be read; name it with --config"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"{file} is not JSON ({error}); name the model's config.json with --config"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{file} is not a model's config.json; name that with --config")
    return config
