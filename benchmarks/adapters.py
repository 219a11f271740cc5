"""Requests with different adapters: in one batch, one after another, and with stock mlx-lm's reload.

    python benchmarks/adapters.py MODEL [--requests 4 8] [--rounds 5] [-o FILE]

MODEL is a folder; on a CPU give one in float32, for stock mlx-lm computes in the type that is stored. Every
request has an adapter of its own, of rank 4, 8 or 16 in all linear layers. Ours is one server with all of
them mounted, without prefix cache; stock is mlx_lm.server, which loads the model and the adapter again when a
request names another one. All take turns in one run, with the same prompts; only ratios mean anything on a
shared machine. How many answers of one batch are those that each adapter gives alone is counted.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_optiq_ext.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
from serve import STOCK, Server, _free_port  # noqa: E402

from mlx_optiq_ext import __version__  # noqa: E402
from mlx_optiq_ext.hub.resolve import resolve_model  # noqa: E402
from mlx_optiq_ext.lora.factors import Adapter, Factors  # noqa: E402
from mlx_optiq_ext.lora.files import write_adapter  # noqa: E402
from mlx_optiq_ext.lora.targets import list_targets  # noqa: E402
from mlx_optiq_ext.models.load import load_model  # noqa: E402
from mlx_optiq_ext.types.adapter import AdapterConfig  # noqa: E402

RANKS = (4, 8, 16)
TOKENS = 32
TOGETHER, APART, RELOAD, BASE = "one batch", "one after another", "stock, reload", "one batch, base alone"
RATIOS = ((TOGETHER, APART), (TOGETHER, RELOAD), (APART, RELOAD), (TOGETHER, BASE))


def main() -> int:
    """Measure, check, write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = make_adapters(args.model, folder, max(args.requests))
        ports = _free_port(), _free_port()
        mounted = [word for path in adapters for word in ("--adapter", f"{path.name}={path}")]
        ours = Server(
            "ours",
            [
                *(sys.executable, "-m", "mlx_optiq_ext", "serve", "--model", args.model),
                *("--port", str(ports[0]), "--prompt-cache", "0", *mounted),
            ],
            ports[0],
            folder / "ours.log",
        )
        try:
            stock = Server(
                "stock",
                [sys.executable, "-c", STOCK, "--model", args.model, "--port", str(ports[1])],
                ports[1],
                folder / "stock.log",
            )
            try:
                rows = [measure(ours, stock, args, adapters[:count]) for count in args.requests]
            finally:
                stock.close()
        finally:
            ours.close()
    if args.out:
        facts = {
            "model": Path(args.model).name,
            "device": str(mx.default_device()),
            "version": __version__,
            "answer_tokens": TOKENS,
            "ranks": RANKS,
            "rounds": args.rounds,
        }
        Path(args.out).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0


def make_adapters(model: str, folder: Path, count: int) -> list[Path]:
    """Adapters of random numbers, small enough that the model still answers, in all linear layers."""
    targets = [t for t in list_targets(load_model(resolve_model(model))[0]) if t.kind == "linear"]
    paths = []
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        factors = {}
        for place, target in enumerate(targets):
            keys = mx.random.split(mx.random.key(1000 * number + place))
            a = mx.random.normal((target.inputs, rank), key=keys[0]) / target.inputs**0.5
            b = mx.random.normal((rank, target.outputs), key=keys[1]) * (0.05 / rank**0.5)
            factors[target.path] = Factors(a, b)
        paths.append(folder / f"adapter-{number}")
        config = AdapterConfig(ranks=dict.fromkeys(factors, rank), scale=1.0)
        write_adapter(paths[-1], Adapter(config, factors))
    return paths


def measure(ours: Server, stock: Server, args: argparse.Namespace, adapters: list[Path]) -> dict[str, Any]:
    """Tokens per second of every way, a round at a time; the order turns."""
    rates: dict[str, list[float]] = {}
    same = 0
    for number in range(args.rounds + 1):
        asked = [f"Round {number}, writer {k}: tell a long story of a river." for k in range(len(adapters))]
        own: list[dict[str, Any]] = [{"adapter": path.name} for path in adapters]
        foreign = [{"model": args.model, "adapters": str(path)} for path in adapters]
        ways: dict[str, Callable[[], tuple[float, list[str]]]] = {
            TOGETHER: lambda: run(ours, asked, own, together=True),  # noqa: B023 - called in this round
            APART: lambda: run(ours, asked, own, together=False),  # noqa: B023
            RELOAD: lambda: run(stock, asked, foreign, together=False),  # noqa: B023
            BASE: lambda: run(ours, asked, [{}] * len(asked), together=True),  # noqa: B023
        }
        answers = {}
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            rate, answers[name] = ways[name]()
            print(f"{len(adapters)} requests, {name:22s} {rate:8.1f} tokens/s", file=sys.stderr, flush=True)
            if number:  # the first round warms up
                rates.setdefault(name, []).append(rate)
        same += sum(a == b for a, b in zip(answers[TOGETHER], answers[APART], strict=True))
    row = {
        "requests": len(adapters),
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": {f"{a} / {b}": spread(rates[a], rates[b]) for a, b in RATIOS},
        "answers_as_alone": same / (len(adapters) * (args.rounds + 1)),
    }
    for name, (low, middle, high) in row["ratios"].items():  # type: ignore[attr-defined]
        print(f"{len(adapters)} requests  {name:42s} {middle:6.2f}  ({low:.2f} to {high:.2f})")
    print(f"{len(adapters)} requests  answers as alone {row['answers_as_alone']:.1%}")
    return row


def spread(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Least, median and largest ratio of the rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def run(
    server: Server, prompts: list[str], fields: list[dict[str, Any]], *, together: bool
) -> tuple[float, list[str]]:
    """Tokens per second over all answers, and these."""
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(prompts) if together else 1) as pool:
        found = list(pool.map(lambda prompt, field: ask(server, prompt, field), prompts, fields))
    seconds = time.monotonic() - began
    return sum(tokens for _, tokens in found) / seconds, [text for text, _ in found]


def ask(server: Server, prompt: str, fields: dict[str, Any]) -> tuple[str, int]:
    """One answer, greedy, and how many tokens it has."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
        **fields,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{server.name} answered {response.status}: {content.decode()[:500]}")
    answer = json.loads(content)
    return answer["choices"][0]["message"].get("content") or "", answer["usage"]["completion_tokens"]


if __name__ == "__main__":
    sys.exit(main())
