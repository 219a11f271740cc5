"""Which programs asked lately, as operators see them."""

from typing import Any

import msgspec
from support_engine import FakeEngine, ready_status
from support_http import client_of, events_of

from mlx_optiq_ext.serve.clients import Clients

HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "model": "m"}


def _scope(agent: bytes, path: str = "/v1/chat/completions") -> Any:
    return {"path": path, "headers": [(b"user-agent", agent)]}


def test_clients_are_listed_by_product_and_dialect_but_operators_are_not() -> None:
    engine = FakeEngine()
    with client_of(engine) as client:
        for _ in range(2):
            client.post(
                "/v1/messages",
                json=HELLO,
                headers={"user-agent": "claude-cli/2.1.0 (external, cli) of /home/me"},
            )
        client.post("/v1/responses", json={"input": "hi"}, headers={"user-agent": "codex_cli_rs/0.5 (Mac)"})
        client.post("/v1/chat/completions", json=HELLO, headers={"user-agent": "(none)"})
        client.get("/optiq/status", headers={"user-agent": "dashboard/1"})
        client.get("/health", headers={"user-agent": "probe/1"})
        client.get("/v1/models", headers={"host": "evil.example", "user-agent": "refused/1"})
        rows = client.get("/optiq/clients").json()["data"]
        shown = client.get("/optiq/status").json()["clients"]
        engine.now = ready_status(state="draining")
        (_, streamed), *_ = events_of(client.get("/optiq/events").text)
    assert [(row["name"], row["dialect"], row["requests"]) for row in rows] == [
        ("unknown", "openai", 1),
        ("codex_cli_rs", "responses", 1),
        ("claude-cli", "anthropic", 2),
    ]
    assert all(0 <= row["last_seen_s"] < 30 for row in rows)
    assert [row["name"] for row in shown] == [row["name"] for row in rows]
    assert [row["name"] for row in msgspec.json.decode(streamed)["clients"]] == [row["name"] for row in rows]


def test_only_the_clients_seen_last_are_kept() -> None:
    now = 100.0
    clients = Clients(clock=lambda: now)
    for number in range(20):
        clients.note(_scope(b"agent%d/1" % number))
        now += 1
    clients.note(_scope(b"agent4/2"))
    kept = clients.status()
    assert len(kept) == 16
    assert (kept[0].name, kept[0].last_seen_s, kept[0].requests) == ("agent4", 0.0, 2)
    assert (kept[-1].name, kept[-1].last_seen_s) == ("agent5", 15.0)
