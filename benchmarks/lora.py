"""Validation loss of adapters of equal numbers of parameters: ranks by sensitivity, constant, and by bits.

    python benchmarks/lora.py BASE --original MODEL -o benchmarks/results/NAME-lora.json

BASE is a checkpoint of `optiq convert` at 3 to 4 bits, whose sensitivity file decides; with --original the
errors' own spectra do too, and adapters that start by undoing them are trained as well. The task is
benchmarks/data/lora_task.jsonl; a seed decides split, order and start, and every rule sees the same three.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_optiq_ext.blas import preload_blas

preload_blas()

from mlx_optiq_ext import __version__  # noqa: E402
from mlx_optiq_ext.hub.resolve import resolve_model  # noqa: E402
from mlx_optiq_ext.lora.prepare import TrainJob  # noqa: E402
from mlx_optiq_ext.lora.train import train_adapter  # noqa: E402
from mlx_optiq_ext.types.adapter import AdapterOptions, RankMap  # noqa: E402
from mlx_optiq_ext.types.model import ModelRef  # noqa: E402
from mlx_optiq_ext.types.training import TrainOptions  # noqa: E402

DATA = Path(__file__).parent / "data" / "lora_task.jsonl"
SEEDS = (0, 1, 2)


def main() -> int:
    """Train every rule with every seed; write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--original")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    base = resolve_model(args.base)
    constant = AdapterOptions(rank=args.rank, rank_scaling="constant")
    rules = {"constant": constant}
    budget = 0
    if args.original:
        rules["by_sensitivity"] = AdapterOptions(
            rank=args.rank, rank_scaling="by_sensitivity", original=args.original
        )
        rules["constant, started by the error"] = AdapterOptions(
            rank=args.rank, rank_scaling="constant", init="error", original=args.original
        )
        rules["by_sensitivity, started by the error"] = AdapterOptions(
            rank=args.rank, rank_scaling="by_sensitivity", init="error", original=args.original
        )
    rules["by_sensitivity, spectra assumed"] = AdapterOptions(rank=args.rank, rank_scaling="by_sensitivity")
    rows = []
    for name, options in [*rules.items(), ("by_bits", None)]:
        # The published rule has no budget of its own: it gets that of the constant rank.
        chosen = options or AdapterOptions(rank=args.rank, rank_scaling="by_bits", max_parameters=budget)
        runs = [train(base, chosen, args.steps, seed) for seed in SEEDS]
        budget = budget or runs[0]["parameters"]
        losses = [run["validation_loss"] for run in runs]
        row = {
            "rule": name,
            "parameters": runs[0]["parameters"],
            "validation_loss": statistics.mean(losses),
            "standard_deviation": statistics.stdev(losses),
            "runs": runs,
        }
        rows.append(row)
        print(name, row["parameters"], [round(loss, 4) for loss in losses], file=sys.stderr, flush=True)
    facts = {"rank": args.rank, "steps": args.steps, "seeds": SEEDS, "version": __version__}
    Path(args.out).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


def train(base: ModelRef, adapter: AdapterOptions, steps: int, seed: int) -> dict[str, Any]:
    """One training, in figures."""
    ranks: list[RankMap] = []
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            base=base,
            data=str(DATA),
            out=Path(folder) / "adapter",
            adapter=adapter,
            options=TrainOptions(
                steps=steps,
                batch_size=8,
                learning_rate=2e-3,
                validation_share=0.2,
                validate_every=steps // 4,
                seed=seed,
            ),
        )
        summary = train_adapter(job, on_ranks=ranks.append)
    assert summary.validation is not None
    assert summary.first_validation is not None
    used = [rank for rank in ranks[0].ranks.values() if rank]
    return {
        "seed": seed,
        "validation_loss": summary.validation.loss,
        "before": summary.first_validation.loss,
        "parameters": ranks[0].num_parameters,
        "ranks": [min(used), max(used)],
        "seconds": round(summary.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
