"""Our server beside stock mlx_lm.server: the same model and machine, interleaved in one run.

    python benchmarks/serve.py MODEL [--rounds 3] [--json FILE]

MODEL is a folder; on a CPU give one in float32, for stock mlx-lm computes in the type that is stored.
Reports, stock and ours: seconds to the first token of a prompt whose 4,000 first tokens are new, of one whose
first 4,000 tokens another session sent, and of one that a client left half-way and sends again; seconds
until four sessions have answers to prompts with one new prefix; tokens per second over 1, 4 and 16 streams;
seconds that a short request takes after a client left (streaming or not), beside the same on an idle server;
growth of the process's memory over 500 requests. Only ratios mean anything on a shared machine.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOCK = (
    "from mlx_optiq_ext.blas import preload_blas; preload_blas(); from mlx_lm import server; server.main()"
)
"""Stock code, with the fast BLAS that ours finds by itself: the comparison is of servers."""
STREAMS = (1, 4, 16)
PREFIX_WORDS = 3000
"""About 4,000 tokens of made-up words."""
WORDS = ("river", "stone", "lantern", "copper", "window", "harbor", "meadow", "signal", "orchard", "thunder")


class Server:
    """One server process."""

    def __init__(self, name: str, command: list[str], port: int, log: Path) -> None:
        self.name, self.port = name, port
        self._log = log.open("w")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self._health() == 200:
                    return
            if self.process.poll() is not None:
                raise SystemExit(f"{name} ended: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        raise SystemExit(f"{name} did not answer in five minutes")

    def _health(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._log.close()

    def rss(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024

    def open(self, words: str, max_tokens: int, *, stream: bool) -> http.client.HTTPConnection:
        """Send a chat request; the caller reads or leaves."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = {
            "model": "default_model",
            "messages": [{"role": "user", "content": words}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": stream,
            "stream_options": {"include_usage": True},
        }
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        return connection

    def ask(self, words: str, max_tokens: int) -> tuple[float, float, int]:
        """Seconds to the first text, seconds in all, tokens of the answer."""
        began = time.monotonic()
        connection = self.open(words, max_tokens, stream=True)
        first, tokens = 0.0, 0
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            delta = (event.get("choices") or [{}])[0].get("delta", {})
            if not first and any(delta.get(name) for name in ("content", "reasoning", "reasoning_content")):
                first = time.monotonic() - began
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        connection.close()
        total = time.monotonic() - began
        return first or total, total, tokens


def text(words: int, seed: str) -> str:
    """Words that no other seed gives."""
    chosen = random.Random(seed)
    return f"{seed}: " + " ".join(chosen.choice(WORDS) for _ in range(words))


def first_token(server: Server, name: str) -> dict[str, float]:
    prefix = text(PREFIX_WORDS, name)
    cold, _, _ = server.ask(f"{prefix}\nWhat is the first word?", 4)
    warm = [server.ask(f"{prefix}\nAnother session, {k}: what is the last word?", 4)[0] for k in range(3)]
    return {"first token, new prefix": cold, "first token, shared prefix": statistics.median(warm)}


def together(server: Server, name: str) -> dict[str, float]:
    """Four sessions of one agent begin at once."""
    prefix = text(PREFIX_WORDS, f"{name} together")
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, f"{prefix}\nSession {k}: what is it?", 4) for k in range(4)]
        for each in asked:
            each.result()
    return {"four answers, one new prefix": time.monotonic() - began}


def asked_again(server: Server, name: str) -> dict[str, float]:
    """A client leaves a long prompt half-way and sends it again, as agents do."""
    prompt = text(PREFIX_WORDS, f"{name} again")
    cold = server.ask(text(PREFIX_WORDS, f"{name} before") + "\nWhy?", 4)[0]
    connection = server.open(prompt + "\nWhy?", 400, stream=True)
    time.sleep(0.6 * cold)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    return {"first token, asked again after leaving": server.ask(prompt + "\nWhy?", 4)[0]}


def throughput(server: Server, name: str) -> dict[str, float]:
    rates = {}
    for streams in STREAMS:
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            asked = [
                pool.submit(server.ask, text(60, f"{name} {streams} {k}") + "\nTell a long story.", 64)
                for k in range(streams)
            ]
            tokens = sum(each.result()[2] for each in asked)
        rates[f"tokens/s, {streams} streams"] = tokens / (time.monotonic() - began)
    return rates


def after_leaving(server: Server, name: str) -> dict[str, float]:
    idle = server.ask(text(20, f"{name} idle"), 8)[1]
    found = {"short request, idle": idle}
    for stream in (True, False):
        connection = server.open(text(400, f"{name} left {stream}") + "\nTell a story.", 400, stream=stream)
        time.sleep(max(1.0, 2 * idle))
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        kind = "streaming" if stream else "not streaming"
        found[f"short request, a client left ({kind})"] = server.ask(text(20, f"{name} after {stream}"), 8)[1]
        time.sleep(1.0)
    return found


def growth(server: Server, requests: int) -> dict[str, float]:
    for k in range(requests // 5):
        server.ask(text(30, f"warm {k}"), 4)
    before = server.rss()
    for k in range(requests - requests // 5):
        server.ask(text(30, f"grow {k}"), 4)
    return {f"memory growth over {requests} requests, MB": (server.rss() - before) / 1e6}


@contextlib.contextmanager
def servers(model: str, folder: Path, prompt_cache: str = "2GB") -> Iterator[list[Server]]:
    ports = [_free_port(), _free_port()]
    commands = {
        "stock": [sys.executable, "-c", STOCK, "--model", model, "--port", str(ports[0])],
        "ours": [
            *(sys.executable, "-m", "mlx_optiq_ext", "serve", "--model", model, "--port", str(ports[1])),
            *("--prompt-cache", prompt_cache),
        ],
    }
    running = []
    try:
        for (name, command), port in zip(commands.items(), ports, strict=True):
            running.append(Server(name, command, port, folder / f"{name}.log"))
        yield running
    finally:
        for server in running:
            server.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    seen: dict[str, dict[str, list[float]]] = {"stock": {}, "ours": {}}
    with tempfile.TemporaryDirectory() as folder, servers(args.model, Path(folder)) as running:
        for each in range(args.rounds):
            for measure in (first_token, together, asked_again, throughput, after_leaving):
                for server in running if each % 2 else running[::-1]:
                    for name, value in measure(server, f"round {each}").items():
                        seen[server.name].setdefault(name, []).append(value)
                        print(f"{server.name:6s} {name:45s} {value:9.3f}", file=sys.stderr, flush=True)
    # Prefixes in a cache that is full before the count begins.
    with tempfile.TemporaryDirectory() as folder, servers(args.model, Path(folder), "100MB") as running:
        for server in running:
            for name, value in growth(server, args.requests).items():
                seen[server.name].setdefault(name, []).append(value)
    rows: list[dict[str, Any]] = []
    for name, values in seen["stock"].items():
        stock, ours = statistics.median(values), statistics.median(seen["ours"][name])
        rows.append(
            {"what": name, "stock": stock, "ours": ours, "ours / stock": ours / stock if stock else 0}
        )
        print(f"{name:45s} {stock:9.3f} {ours:9.3f}   ours / stock {ours / stock if stock else 0:.2f}")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"model": Path(args.model).name, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
