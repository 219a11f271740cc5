"""Time of one decoded token with a stored KV cache, as a ratio to mlx-lm's full-precision cache.

Random weights in the shape of real models, caches filled to the context, all storages in turn within one
process. Run as ``python benchmarks/kv_speed.py [--dtype bfloat16] [-o FILE]``; a benchmark, never a test.
"""

import argparse
import json
import time
from pathlib import Path

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_optiq_ext.kv.build import build_caches, encode_mean  # noqa: E402
from mlx_optiq_ext.kv.observe import observe  # noqa: E402
from mlx_optiq_ext.patches.registry import activate  # noqa: E402
from mlx_optiq_ext.types.kv import KVConfig, KVLayer  # noqa: E402
from mlx_optiq_ext.types.quant import Choice  # noqa: E402

SHAPES = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "8B/2": {"hidden_size": 4096, "num_hidden_layers": 16, "intermediate_size": 14336,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
STORAGES = ("8g64 8g64", "6g64 4g64", "4g64 4g64", "3g64 3g64")


def main() -> None:
    """Time every storage and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--contexts", default="4096")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("-o", "--out")
    args = parser.parse_args()
    activate("mlx_lm.models.base")
    rows = []
    for shape in args.shapes.split(","):
        model = _model(shape, getattr(mx, args.dtype))
        for context in map(int, args.contexts.split(",")):
            rows += _measure(model, shape, context, args.steps)
    if args.out:
        record = {"device": str(mx.default_device()), "dtype": args.dtype, "rows": rows}
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def _model(shape: str, dtype: mx.Dtype) -> llama.Model:
    common = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    model = llama.Model(llama.ModelArgs(**common, **SHAPES[shape]))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _measure(model: llama.Model, shape: str, context: int, steps: int) -> list[dict]:
    sites = observe(model).sites
    mean = encode_mean(mx.zeros((sites[0].heads, sites[0].key_dim)))
    variants = {"full": lambda: make_prompt_cache(model)}
    for rotate in (False, True):
        for text in STORAGES:
            k, v = map(Choice.parse, text.split())
            layers = tuple(
                KVLayer(index=site.index, k=k, v=v, key_mean=mean if rotate else "") for site in sites
            )
            config = KVConfig(layers=layers, rotate=rotate)
            label = f"{text}{', centred and rotated' if rotate else ''}"
            variants[label] = lambda config=config: build_caches(model, config)
    filled = {}
    for label, make in variants.items():
        caches = make()
        for start in range(0, context, 2048):
            model(mx.ones((1, min(2048, context - start)), dtype=mx.int32), cache=caches)
            mx.eval([cache.state for cache in caches])
        filled[label] = caches
    if mx.default_device() == mx.cpu:  # quantized products in bfloat16 did not return on CUDA
        filled["stock 4-bit"] = [c.to_quantized(group_size=64, bits=4) for c in filled["full"]]
    times: dict[str, list[float]] = {label: [] for label in filled}
    for step in range(steps):
        for label, caches in filled.items():  # in turn, so that drift hits all alike
            begin = time.perf_counter()
            try:
                mx.eval(model(mx.array([[step]]), cache=caches))
            except (RuntimeError, ValueError) as error:
                if not step:
                    print(f"{label}: {error}", flush=True)
                continue
            times[label].append(time.perf_counter() - begin)
    full = float(np.median(times["full"][5:]))
    rows = []
    for label, taken in times.items():
        if len(taken) < steps:
            continue
        median = float(np.median(taken[5:]))
        held = sum(cache.nbytes for cache in filled[label])
        row = {"shape": shape, "context": context, "storage": label, "ms": 1e3 * median}
        rows.append({**row, "ratio": median / full, "bytes": held})
        text = f"{shape:6} {context:6} {label:36} {1e3 * median:8.3f} ms  × {median / full:.3f}"
        print(f"{text}  {held / 1e6:9.1f} MB", flush=True)
    return rows


if __name__ == "__main__":
    main()
