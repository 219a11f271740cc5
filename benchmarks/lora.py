"""Validation loss of adapters of equal numbers of parameters: constant rank, by bits, and by sensitivity.

    python benchmarks/lora.py BASE [--original MODEL] -o benchmarks/results/NAME-lora.json

BASE is a checkpoint of `optiq convert` at 3 to 4 bits, whose sensitivity file decides. The task is
benchmarks/data/lora_task.jsonl. A seed decides split, order and start; every rule sees the same seeds, one
after another, and is compared with the constant rank seed by seed. With --original adapters that start by
undoing the quantization error are trained as well.
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

from msgspec.structs import replace  # noqa: E402

from mlx_optiq_ext import __version__  # noqa: E402
from mlx_optiq_ext.hub.resolve import resolve_model  # noqa: E402
from mlx_optiq_ext.lora.prepare import TrainJob  # noqa: E402
from mlx_optiq_ext.lora.train import train_adapter  # noqa: E402
from mlx_optiq_ext.types.adapter import AdapterOptions, RankMap  # noqa: E402
from mlx_optiq_ext.types.model import ModelRef  # noqa: E402
from mlx_optiq_ext.types.training import TrainOptions  # noqa: E402

DATA = Path(__file__).parent / "data" / "lora_task.jsonl"
CONSTANT = "constant"
FACTS = ("rank", "steps", "batch_size", "learning_rate", "validation_share", "seeds")


def main() -> int:
    """Train every rule with every seed; write the figures as JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--original")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--validation-share", type=float, default=0.2)
    parser.add_argument("--rules", nargs="+", help="only these of constant, by_sensitivity, by_bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    base = resolve_model(args.base)
    facts = {
        "model": Path(args.base).name,
        "bits_per_weight": stored_bits(Path(args.base)),
        **{name: getattr(args, name) for name in FACTS},
        "version": __version__,
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for name, adapter in rules(args).items():
            if (
                name == "by_bits"
            ):  # the published rule has no budget of its own: it gets that of the constant rank
                adapter = replace(adapter, max_parameters=runs[CONSTANT][0]["parameters"])
            options = TrainOptions(
                steps=args.steps,
                batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                validation_share=args.validation_share,
                validate_every=args.steps // 2,
                seed=seed,
            )
            runs.setdefault(name, []).append(train(base, adapter, options))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
            rows = [row(name, each, runs[CONSTANT]) for name, each in runs.items()]
            Path(args.out).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


def rules(args: argparse.Namespace) -> dict[str, AdapterOptions]:
    """What is compared."""
    found = {
        CONSTANT: AdapterOptions(rank=args.rank, rank_scaling="constant"),
        "by_sensitivity": AdapterOptions(rank=args.rank, rank_scaling="by_sensitivity"),
        "by_bits": AdapterOptions(rank=args.rank, rank_scaling="by_bits"),
    }
    if args.original:
        started = {"rank": args.rank, "init": "error", "original": args.original}
        found["constant, started by the error"] = AdapterOptions(rank_scaling="constant", **started)
        found["by_sensitivity, started by the error"] = AdapterOptions(
            rank_scaling="by_sensitivity", **started
        )
    return {name: found[name] for name in args.rules or found}


def train(base: ModelRef, adapter: AdapterOptions, options: TrainOptions) -> dict[str, Any]:
    """One training, in figures."""
    ranks: list[RankMap] = []
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            base=base, data=str(DATA), out=Path(folder) / "adapter", adapter=adapter, options=options
        )
        summary = train_adapter(job, on_ranks=ranks.append)
    assert summary.validation is not None
    assert summary.first_validation is not None
    used = [rank for rank in ranks[0].ranks.values() if rank]
    return {
        "seed": options.seed,
        "validation_loss": summary.validation.loss,
        "before": summary.first_validation.loss,
        "parameters": ranks[0].num_parameters,
        "ranks": [min(used), max(used)],
        "seconds": round(summary.seconds, 1),
    }


def row(name: str, runs: list[dict[str, Any]], constant: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, spread over seeds, and the differences from the constant rank with the same seed."""
    losses = [run["validation_loss"] for run in runs]
    pairs = zip(losses, constant, strict=False)
    return {
        "rule": name,
        "parameters": runs[0]["parameters"],
        "validation_loss": statistics.mean(losses),
        "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "minus_constant": [round(loss - other["validation_loss"], 4) for loss, other in pairs],
        "runs": runs,
    }


def stored_bits(folder: Path) -> float:
    """Bits per weight, everything counted."""
    table = json.loads((folder / "optiq" / "sensitivity.json").read_text())
    nbytes = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return round(8 * nbytes / table["total_numel"], 2)


if __name__ == "__main__":
    sys.exit(main())
