"""Divergence of a KV cache at equal true bits: stock uniform, rotated, and what `optiq kv-cache` accepts.

    python benchmarks/kv_cache.py MODEL -o benchmarks/results/NAME-kv.json

Half of the shipped held-out documents decide which storage is accepted, the other half is scored, so nothing
is judged on text it was chosen on.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from mlx_optiq_ext import __version__  # noqa: E402
from mlx_optiq_ext.convert.kv_cache import plan_cache  # noqa: E402
from mlx_optiq_ext.eval.kv_score import NamedConfig, score_caches  # noqa: E402
from mlx_optiq_ext.hub.resolve import resolve_model  # noqa: E402
from mlx_optiq_ext.kv.observe import observe  # noqa: E402
from mlx_optiq_ext.measure.intervals import estimate_mean  # noqa: E402
from mlx_optiq_ext.measure.records import read_records  # noqa: E402
from mlx_optiq_ext.measure.sessions import load_sessions  # noqa: E402
from mlx_optiq_ext.models.load import load_model, load_tokenizer  # noqa: E402
from mlx_optiq_ext.patches.registry import activate  # noqa: E402
from mlx_optiq_ext.quant.exact import make_exact  # noqa: E402
from mlx_optiq_ext.types.kv import KVConfig, KVLayer, KVSensitivity  # noqa: E402
from mlx_optiq_ext.types.options import KVCacheOptions  # noqa: E402
from mlx_optiq_ext.types.quant import Choice  # noqa: E402

LENGTHS = (256, 1024, 4096)
STEP = 512
MOST_WINDOWS = 6
BITS = (3, 4, 5, 6)


def main() -> int:
    """Measure, accept and score; write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--num-tokens", type=int, default=8192)
    args = parser.parse_args()
    activate("mlx_lm.models.base")
    ref = resolve_model(args.model, None)
    with tempfile.TemporaryDirectory() as folder:
        accepting, scoring = (Path(folder) / name for name in ("accepting.jsonl", "scoring.jsonl"))
        records = read_records(None, "held_out")
        for file, half in ((accepting, records[::2]), (scoring, records[1::2])):
            file.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in half))
        plans = {}
        known: dict[bool, KVSensitivity] = {}
        for rotate in (True, False):
            for bits in BITS:
                options = KVCacheOptions(
                    target_bits=bits + 0.5,
                    context=LENGTHS[-1],
                    num_tokens=args.num_tokens,
                    held_out=str(accepting),
                    rotate=rotate,
                    recent=0,
                )
                plan = plan_cache(ref, options, known=known.get(rotate))
                known[rotate] = plan.table
                plans[rotate, bits] = plan.config
                print(rotate, bits, plan.config.chosen, file=sys.stderr, flush=True)
        model, _ = load_model(ref)
        make_exact(model, ref.source)
        tokenizer = load_tokenizer(ref)
        whole = load_sessions(tokenizer, (1,), num_tokens=10**9, source=str(scoring), split="held_out")
        stream = whole.windows[1][:, 0]
    configs = _configs(model, plans, known)
    rows = []
    numbers = {
        length: score_caches(model, _windows(stream, length), configs)
        for length in LENGTHS
        if length <= len(stream)
    }
    for k, named in enumerate(configs):
        row = {"label": named.label, "bits": round(named.config.bits_per_number, 3)}
        for length, found in numbers.items():
            estimate = estimate_mean(found[k + 1].divergence)
            row[str(length)] = {
                "kl": estimate.mean,
                "stderr": estimate.stderr,
                "top1": float(found[k + 1].top1.mean()),
                "perplexity_ratio": float(np.exp((found[k + 1].nll - found[0].nll).mean())),
                "bytes_held": found[k + 1].nbytes,
                "bytes_full": found[0].nbytes,
            }
        rows.append(row)
    result = {
        "model": Path(ref.path).name,
        "version": __version__,
        "device": str(mx.default_device()),
        "windows": {str(length): len(_windows(stream, length)) for length in numbers},
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(_table(rows))
    return 0


def _windows(stream: np.ndarray, length: int) -> np.ndarray:
    """Windows that end apart from each other; long ones share their beginnings."""
    starts = list(range(0, len(stream) - length + 1, STEP))[:MOST_WINDOWS]
    return np.stack([stream[start : start + length] for start in starts])


def _configs(model, plans: dict, known: dict) -> list[NamedConfig]:
    sites = observe(model).sites
    found = []
    for bits in BITS:
        choice = Choice(bits=bits, group_size=64)
        plain = tuple(KVLayer(index=site.index, member=site.member, k=choice, v=choice) for site in sites)
        true = bits + 0.5
        stock = KVConfig(layers=plain, rotate=False, bits_per_number=true)
        found.append(NamedConfig(f"stock uniform {bits}", stock))
        rotated = tuple(
            replace(layer, key_mean=mean) for layer, mean in zip(plain, known[True].key_means, strict=True)
        )
        found.append(
            NamedConfig(f"uniform {bits}, centred and rotated", replace(stock, layers=rotated, rotate=True))
        )
        found.append(NamedConfig(f"accepted at {true}, not rotated", plans[False, bits]))
        found.append(NamedConfig(f"accepted at {true}", plans[True, bits]))
    for target, tied in ((5.0, _greedy(known[False], 5.0)), (6.0, _greedy(known[False], 6.0))):
        layers = tuple(
            KVLayer(index=site.index, member=site.member, k=tied[site.name], v=tied[site.name])
            for site in sites
        )
        bits = float(np.mean([tied[site.name].bpw() for site in sites]))
        found.append(
            NamedConfig(
                f"published rule {{4,8}} at nominal {target}",
                KVConfig(layers=layers, rotate=False, bits_per_number=bits),
            )
        )
    return found


def _greedy(table: KVSensitivity, target: float) -> dict[str, Choice]:
    """The published rule: 4 bits, and 8 for the most sensitive layers up to a nominal mean."""
    low, high = Choice(bits=4, group_size=64), Choice(bits=8, group_size=64)
    felt: dict[str, float] = {}
    names = {(site.index, site.member): site.name for site in table.sites}
    for probe in table.probes:
        if probe.choice == low:
            name = names[probe.index, probe.member]
            felt[name] = felt.get(name, 0.0) + probe.divergence
    order = sorted(felt, key=lambda name: -felt[name])
    raised = int(np.ceil((target - 4) / 4 * len(order)))
    return {name: high if k < raised else low for k, name in enumerate(order)}


def _table(rows: Sequence[dict]) -> str:
    lengths = [key for key in rows[0] if key.isdigit()]
    lines = [f"{'storage':42} {'bits':>6} " + " ".join(f"{'KL at ' + n:>12}" for n in lengths)]
    lines += [
        f"{row['label']:42} {row['bits']:6.3f} " + " ".join(f"{row[n]['kl']:12.5f}" for n in lengths)
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
