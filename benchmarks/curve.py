"""Bits against divergence: ours at every stage, and what it is compared with; one run, one held-out text.

    python benchmarks/curve.py MODEL [--dither DIR] [--budgets 3.5,4,4.5,5,5.5,6] [--out curve.json]

Baselines are computed here from their public definitions: plain uniform affine, mlx-lm's ``mixed_4_6`` and
``dynamic_quant`` 4/5, and a greedy ascent over {4, 8} bits as published (our estimates in place of its
probes). ``--dither`` re-randomises weights that came off a 4-bit grid (SmolLM2 from its GGUF) within their
cells, so that no method can find the grid again. Everything is scored in float32.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
from mlx_lm.quant.dynamic_quant import estimate_sensitivities  # noqa: E402
from mlx_lm.utils import save  # noqa: E402

from mlx_optiq_ext.allocate.bitmap import allocate  # noqa: E402
from mlx_optiq_ext.convert.rewrite import Rewriter  # noqa: E402
from mlx_optiq_ext.eval import score as score_module  # noqa: E402
from mlx_optiq_ext.eval.score import HeldOutScorer  # noqa: E402
from mlx_optiq_ext.hub.resolve import resolve_model  # noqa: E402
from mlx_optiq_ext.measure.calibration import load_windows  # noqa: E402
from mlx_optiq_ext.models.load import cast_floats, load_model, load_tokenizer  # noqa: E402
from mlx_optiq_ext.models.walk import get_module, quantizable_modules, total_numel  # noqa: E402
from mlx_optiq_ext.quant.reference import Reference  # noqa: E402
from mlx_optiq_ext.quant.sensitivity import measure_sensitivity  # noqa: E402
from mlx_optiq_ext.types.model import ModelRef  # noqa: E402
from mlx_optiq_ext.types.options import AllocateOptions, MeasureOptions, ScoreOptions  # noqa: E402
from mlx_optiq_ext.types.quant import BitMap, Choice, SensitivityTable  # noqa: E402


def score_in_float32() -> None:
    """Run every scored model in float32 on every back end, so that kernels add nothing to the divergence."""

    def exact(model: Any, _: str) -> Any:
        cast_floats(model, mx.float32)
        mx.eval(model.parameters())
        model.eval()
        return model

    score_module.make_exact = exact


def main() -> None:
    score_in_float32()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budgets", default="3.5,4.0,4.5,5.0,5.5,6.0")
    parser.add_argument("--levels", default="none,fast,full")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--rewrite-tokens", type=int, default=8192)
    parser.add_argument("--groups", default="64")
    parser.add_argument("--dither", type=Path, metavar="DIR", help="write the dithered model here and use it")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument(
        "--uniform-corrected", action="store_true", help="also uniform choices with our rounding"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ref = resolve_model(args.model)
    if args.dither:
        ref = dithered(ref, args.dither)
    run = Run(ref, args)
    if not args.no_baselines:
        run.baselines()
    for level in args.levels.split(","):
        run.ours(level)


class Run:
    """Everything that is measured in one go."""

    def __init__(self, ref: ModelRef, args: argparse.Namespace) -> None:
        self.ref, self.args = ref, args
        self.rows: list[dict[str, Any]] = []
        self.budgets = [float(b) for b in args.budgets.split(",")]
        self.tables: dict[str, SensitivityTable] = {}
        self.scorer = HeldOutScorer(ref, ScoreOptions(num_tokens=args.tokens))
        self.scorer.__enter__()
        self.units = self.open().units((Choice.parse("4"),))

    def open(self) -> Reference:
        """A fresh resident reference."""
        return Reference(self.ref, how="resident")

    def table(self, level: str, **options: Any) -> SensitivityTable:
        wanted = MeasureOptions(
            correction=level,
            num_tokens=self.args.calibration_tokens,
            candidate_groups=self.args.groups,
            **options,
        )
        started = time.perf_counter()
        table = measure_sensitivity(self.ref, wanted, reference=self.open())
        print(f"# measured ({level}) in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return table

    def score(self, label: str, bit_map: BitMap, level: str, table: SensitivityTable | None = None) -> None:
        """Quantize a fresh copy after a bit map and score it."""
        reference = self.open()
        tokens = None
        if level != "none":
            windows = load_windows(
                reference.tokenizer(), source=None, split="calibration",
                num_tokens=self.args.rewrite_tokens, window=128,
            )  # fmt: skip
            tokens = mx.array(windows.tokens)
        columns = table.column_importance if table else {}
        rewriter = Rewriter(
            reference, bit_map, level=level, dtype=reference.stored_dtype, columns=columns, writer=None
        )
        rewriter.run(tokens, lambda _: None)
        reference.model.eval()
        bits = reference.fixed_bits(self.units) + sum(
            bit_map.choices[path].stored_bits(unit.numel // len(unit.paths))
            for unit in self.units
            for path in unit.paths
        )
        row = self.scorer.add_model(reference.model, label, nbytes=bits // 8)
        bpw = bits / total_numel(reference.model)
        found = {
            "label": label, "bpw": round(bpw, 4), "kl": row.divergence, "stderr": row.divergence_stderr,
            "top1": row.top1, "perplexity": row.perplexity,
        }  # fmt: skip
        self.rows.append(found)
        if self.args.out:
            self.args.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(
            f"{label:34s} {bpw:7.4f} bpw  KL {row.divergence:.4f} ± {row.divergence_stderr:.4f}"
            f"  top-1 {100 * row.top1:.1f} %  ppl {row.perplexity:.2f}",
            flush=True,
        )

    def uniform_map(self, choice: Choice) -> BitMap:
        return BitMap(choices={p: choice for u in self.units for p in u.paths})

    def baselines(self) -> None:
        for label in ("3g64", "3g32", "4g64", "4g32", "5g64", "6g64"):
            self.score(f"uniform {label}", self.uniform_map(Choice.parse(label)), "none")
        self.score("mixed_4_6", self.from_predicate(mixed_4_6), "none")
        self.dynamic_quant()
        plain = self.tables.setdefault("none", self.table("none", probes=0))
        for target in (5.0, 5.5, 6.0):
            only = MeasureOptions(correction="none", candidate_bits="4,8", probes=0)
            allocation = allocate(restrict(plain, only), AllocateOptions(target_bpw=target, solver="greedy"))
            self.score(f"greedy {{4,8}} @{target}", allocation.bit_map, "none")

    def from_predicate(self, build: Callable[[Any], Callable[[str, Any], Any]]) -> BitMap:
        model = self.open().model
        predicate = build(model)
        choices = {}
        for unit in self.units:
            for path in unit.paths:
                rule = predicate(path, get_module(model, path))
                choices[path] = Choice(bits=rule["bits"], group_size=rule["group_size"] or 64)
        return BitMap(choices=choices)

    def dynamic_quant(self) -> None:
        """mlx-lm's own sensitivities, 4/5 bits; its threshold found at 5.0 stored bits by sorting."""
        reference = self.open()
        reference.model.eval()
        windows = load_windows(
            reference.tokenizer(), source=None, split="calibration",
            num_tokens=self.args.calibration_tokens, window=128,
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                found = estimate_sensitivities(reference.model, mx.array(windows.tokens), 4, 64, 5, 64)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                print(f"# dynamic_quant does not run on this model: {error}", file=sys.stderr)
                return
        choices = dict(self.uniform_map(Choice.parse("4")).choices)
        budget = 5.0 * total_numel(reference.model) - reference.fixed_bits(self.units)
        numel = {path: unit.numel // len(unit.paths) for unit in self.units for path in unit.paths}
        spent = sum(c.stored_bits(numel[p]) for p, c in choices.items())
        for path, _ in sorted(found, key=lambda item: -item[1]):
            if spent + numel[path] <= budget:
                choices[path] = Choice.parse("5")
                spent += numel[path]
        self.score("dynamic_quant 4/5 @5.0", BitMap(choices=choices), "none")

    def ours(self, level: str) -> None:
        table = self.tables.get(level) or self.tables.setdefault(level, self.table(level, probes=0))
        for target in self.budgets:
            allocation = allocate(table, AllocateOptions(target_bpw=target))
            self.score(f"ours {level} @{target}", allocation.bit_map, level, table)
        for label in ("3g64", "4g64", "5g64"):
            if level != "none" and self.args.uniform_corrected:
                self.score(f"uniform {label} + {level}", self.uniform_map(Choice.parse(label)), level, table)


def mixed_4_6(model: Any) -> Callable[[str, Any], Any]:
    """Stock recipe."""
    import importlib

    return importlib.import_module("mlx_lm.convert").mixed_quant_predicate_builder("mixed_4_6", model, 64)


def restrict(table: SensitivityTable, options: MeasureOptions) -> SensitivityTable:
    """The table with fewer choices."""
    from msgspec.structs import replace

    from mlx_optiq_ext.quant.reference import parse_candidates

    wanted = set(parse_candidates(options))
    units = tuple(
        replace(u, choices=tuple(c for c in u.choices if c in wanted) or u.choices) for u in table.units
    )
    kept = {(u.path, c) for u in units for c in u.choices}
    return replace(table, units=units, probes=tuple(p for p in table.probes if (p.path, p.choice) in kept))


def dithered(ref: ModelRef, out: Path) -> ModelRef:
    """The model with every weight moved uniformly within its Q4_1 cell (step = range / 15 per 32 weights)."""
    if not out.exists():
        model, config = load_model(ref)
        for n, (_, module) in enumerate(sorted(quantizable_modules(model).items())):
            weight = module.weight.astype(mx.float32)
            groups = weight.reshape(*weight.shape[:-1], -1, 32)
            step = (groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)) / 15
            noise = mx.random.uniform(-0.5, 0.5, groups.shape, key=mx.random.key(n)) * step
            module.weight = (groups + noise).reshape(weight.shape).astype(mx.bfloat16)
        save(out, ref.path, model, load_tokenizer(ref), config)
    return resolve_model(str(out))


if __name__ == "__main__":
    main()
