"""Record what ``optiq tui --demo`` plays: a running server under some load, and a few of its answers.

The server that was recorded: SmolLM2-135M-Instruct in float32, its KV cache at 5.0 bits (`optiq kv-cache`),
and two small adapters (`optiq lora train` on fourteen examples each) below one folder:

    optiq serve --model SmolLM2-135M-Instruct --kv-config KV/kv_config.json --memory 1GB --max-rows 8 \
        --adapters-dir adapters --port 8080
    python docs/pictures/record.py --mount pirate --leave terse
"""

import argparse
import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_tui.chat_stream import ChatDelta
from mlx_optiq_tui.client import DEFAULT_URL, ServerClient
from mlx_optiq_tui.demo.recording import Answer, Moment, Recording, recording_bytes

OUT = Path(__file__).parents[2] / "tui" / "mlx_optiq_tui" / "data" / "recording.json.gz"
SECONDS = 60
PROMPTS = (
    "In two sentences: why is the sky blue?",
    "Write a Python function that says whether a number is prime.",
    "What should I cook with rice and tomatoes?",
    "Name three rivers in Africa and one fact about each.",
)
SYSTEM = "You are a helpful assistant. Answer briefly and to the point. " * 12


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--mount", required=True, help="Source of an adapter that is mounted.")
    parser.add_argument("--leave", required=True, help="Source of one that can be.")
    args = parser.parse_args()
    recording = asyncio.run(record(ServerClient(args.url), args.mount, args.leave))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(recording_bytes(recording))


async def record(client: ServerClient, mounted: str, left: str) -> Recording:
    """One minute of load, then answers of the model and of each adapter."""
    await client.mount(mounted, mounted)
    load = [asyncio.create_task(ask_again_and_again(client, number, mounted)) for number in range(5)]
    moments = await record_moments(client)
    for task in load:
        task.cancel()
    await asyncio.gather(*load, return_exceptions=True)
    available = await client.mount(left, left)
    answers = []
    for prompt in PROMPTS:
        answers.append(await record_answer(client, prompt, "base", ""))
        answers += [
            await record_answer(client, prompt, each.name, each.source)
            for each in (await client.adapters()).data
        ]
    return Recording(moments=tuple(moments), answers=tuple(answers), available=(available,))


async def ask_again_and_again(client: ServerClient, number: int, adapter: str) -> None:
    """One client that works: prompts in turn, with a pause between."""
    await asyncio.sleep(3 + 2.5 * number)
    turn = number
    while True:
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": PROMPTS[turn % len(PROMPTS)]},
            ],
            "user": f"session-{number}",
            "max_tokens": 40 + 60 * (number % 3),
            "temperature": 0.7,
            "adapter": adapter if number % 2 else "base",
        }
        async for _ in client.chat(body):
            pass
        await asyncio.sleep(1 + number)
        turn += 1


async def record_moments(client: ServerClient) -> list[Moment]:
    """A snapshot each second, with the lines that the log had since."""
    lines: list[LogLine] = []

    async def follow() -> None:
        async for line in client.follow_log():
            lines.append(line)  # noqa: PERF401 - others empty it meanwhile

    follower = asyncio.create_task(follow())
    moments = []
    for _ in range(SECONDS):
        await asyncio.sleep(1.0)
        new, lines[:] = tuple(lines), []
        moments.append(Moment(status=await client.status(), lines=new))
    follower.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await follower
    return moments


async def record_answer(client: ServerClient, prompt: str, adapter: str, source: str) -> Answer:
    """One answer, piece by piece."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "adapter": adapter,
        "max_tokens": 120,
        "temperature": 0.0,
    }
    began, first, deltas = time.monotonic(), 0.0, list[ChatDelta]()
    async for delta in client.chat(body):
        if delta.text and not first:
            first = time.monotonic() - began
        deltas.append(delta)
    seconds = time.monotonic() - began
    return Answer(prompt=prompt, adapter=source, deltas=tuple(deltas), first_token_s=first, seconds=seconds)


if __name__ == "__main__":
    main()
