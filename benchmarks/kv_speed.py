"""Time of one decoded token with a stored KV cache, as a ratio to mlx-lm's full-precision cache.

Random weights in the shape of real models, caches filled to the context with random keys and values, all
storages in turn within one process, several rounds of some tokens each. Run as
``python benchmarks/kv_speed.py [--dtype bfloat16] [-o FILE]``; a benchmark, never a test.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_optiq_ext.kv.build import build_caches, encode_mean  # noqa: E402
from mlx_optiq_ext.kv.cuda import SWITCH, is_wanted  # noqa: E402
from mlx_optiq_ext.kv.observe import observe  # noqa: E402
from mlx_optiq_ext.patches.registry import activate  # noqa: E402
from mlx_optiq_ext.types.kv import KVConfig, KVLayer  # noqa: E402
from mlx_optiq_ext.types.quant import Choice  # noqa: E402

SHAPES = {
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "8B/2": {"hidden_size": 4096, "num_hidden_layers": 16, "intermediate_size": 14336,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "8B/8": {"hidden_size": 4096, "num_hidden_layers": 4, "intermediate_size": 14336,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
_WARM_UP = 3
"""Tokens of every turn that are not timed."""
STORAGES = ("8g64 8g64", "6g64 4g64", "4g64 4g64", "3g64 3g64")


def main() -> None:
    """Time every storage and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="135M,8B/2")
    parser.add_argument("--contexts", default="4096")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--storages", default=",".join(STORAGES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("-o", "--out")
    args = parser.parse_args()
    activate("mlx_lm.models.base")
    rows = []
    for shape in args.shapes.split(","):
        model = _model(shape, getattr(mx, args.dtype))
        for context in map(int, args.contexts.split(",")):
            measured = _measure(model, _variants(model, args.storages.split(",")), context, args)
            rows += [{"shape": shape, **row} for row in measured]
    if args.out:
        device = mx.device_info().get("device_name", "") if mx.default_device() == mx.gpu else "cpu"
        record = {"device": device, "dtype": args.dtype, "batch": args.batch, "rows": rows}
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


def _model(shape: str, dtype: mx.Dtype) -> llama.Model:
    common = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    model = llama.Model(llama.ModelArgs(**common, **SHAPES[shape]))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _variants(model: llama.Model, storages: list[str]) -> dict[str, Callable[[], list]]:
    """What makes the caches of each storage, by label; the first is mlx-lm's full precision."""
    sites = observe(model).sites
    mean = encode_mean(mx.zeros((sites[0].heads, sites[0].key_dim)))
    variants: dict[str, Callable[[], list]] = {"full": lambda: make_prompt_cache(model)}
    for rotate in (False, True):
        for text in storages:
            k, v = map(Choice.parse, text.split())
            layers = tuple(
                KVLayer(index=site.index, k=k, v=v, key_mean=mean if rotate else "") for site in sites
            )
            config = KVConfig(layers=layers, rotate=rotate)
            label = f"{text}{', centred and rotated' if rotate else ''}"
            variants[label] = lambda config=config: build_caches(model, config)
            if is_wanted() and text == storages[-1]:
                variants[f"{label}, without kernels"] = lambda config=config: _without_kernels(model, config)
    return variants


def _without_kernels(model: llama.Model, config: KVConfig) -> list:
    os.environ[SWITCH] = "0"
    caches = build_caches(model, config)
    del os.environ[SWITCH]
    return caches


def _fill(caches: list, model: llama.Model, batch: int, context: int) -> None:
    """Give every cache the same random keys and values; evaluates."""
    shape = (model.args.num_key_value_heads, model.args.hidden_size // model.args.num_attention_heads)
    dtype = model.model.embed_tokens.weight.dtype
    for index, cache in enumerate(caches):
        for start in range(0, context, 2048):
            count = min(2048, context - start)
            keys, values = mx.random.normal(
                (2, batch, shape[0], count, shape[1]), dtype=dtype, key=mx.random.key(index * 10**6 + start)
            )
            cache.update_and_fetch(keys, values)
            mx.eval(cache.state)


def _measure(
    model: llama.Model, variants: dict[str, Callable[[], list]], context: int, args: argparse.Namespace
) -> list[dict]:
    filled = {}
    for label, make in variants.items():
        filled[label] = make()
        _fill(filled[label], model, args.batch, context)
    if mx.default_device() == mx.cpu:  # quantized products in bfloat16 did not return on CUDA
        filled["stock 4-bit"] = [c.to_quantized(group_size=64, bits=4) for c in filled["full"]]
    times: dict[str, list[float]] = {label: [] for label in filled}
    for _ in range(args.rounds):  # in turn, so that drift hits all alike
        for label, caches in filled.items():
            taken = []
            for step in range(args.steps):
                begin = time.perf_counter()
                mx.eval(model(mx.full((args.batch, 1), step), cache=caches))
                taken.append(time.perf_counter() - begin)
            times[label].append(float(np.median(taken[_WARM_UP:])))
    rows = []
    for label, rounds in times.items():
        ratios = np.array(rounds) / np.array(times["full"])
        held = sum(cache.nbytes for cache in filled[label])
        row = {"context": context, "storage": label, "ms": 1e3 * float(np.median(rounds)), "bytes": held}
        row["ms_fastest"] = 1e3 * min(rounds)
        row["ratio"], row["ratio_rounds"] = float(np.median(ratios)), [float(x) for x in np.sort(ratios)]
        rows.append(row)
        text = f"{context:6} {label:48} {row['ms']:8.3f} ms  × {row['ratio']:.3f}"
        print(f"{text}  fastest {row['ms_fastest']:.3f} ms  {held / 1e6:9.1f} MB", flush=True)
    return rows


if __name__ == "__main__":
    main()
