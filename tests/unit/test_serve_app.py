"""The HTTP frame: paths, methods, keys, pages, the log, and what operators ask for."""

import msgspec
import pytest
from litestar.testing import TestClient
from support_engine import FakeEngine, answer, ready_status
from support_http import client_of, events_of

from mlx_optiq_ext.errors import EngineStopped, QueueFull
from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import LatencySum, LayerBytes, RowStatus

HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def _guarded(**options: object) -> TestClient:  # type: ignore[type-arg]
    app = create_app(FakeEngine(), ServeOptions(**options), "secret")  # type: ignore[arg-type]
    return TestClient(app, base_url="http://127.0.0.1:8080")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/api/show", 404),
        ("GET", "/version", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/v1/responses", 405),
    ],
)
def test_unknown_paths_and_methods_are_answered_in_openai_shape(method: str, path: str, status: int) -> None:
    with client_of(FakeEngine()) as client:
        answered = client.request(method, path)
    assert answered.status_code == status
    assert answered.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "status"), [("/v1/messages", 405), ("/v1/messages/batches", 404)])
def test_unknown_paths_and_methods_are_answered_in_anthropic_shape(path: str, status: int) -> None:
    with client_of(FakeEngine()) as client:
        answered = client.get(path)
    assert answered.status_code == status
    assert answered.json()["type"] == "error"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/models", "GET, OPTIONS"), ("/v1/messages", "OPTIONS, POST"), ("/v1/responses", "OPTIONS, POST")],
)
def test_a_wrong_method_is_told_which_are_right(path: str, allowed: str) -> None:
    with client_of(FakeEngine()) as client:
        answered = client.put(path)
    assert answered.status_code == 405
    assert ", ".join(sorted(answered.headers["allow"].split(", "))) == allowed


def test_start_page_is_cheap_and_query_strings_are_ignored() -> None:
    with client_of(FakeEngine()) as client:
        assert client.head("/").status_code == 200
        assert client.get("/").json() == {"status": "ready", "reason": None}
        assert client.post("/v1/chat/completions?beta=true&x", json=HELLO).status_code == 200
        assert "server" not in client.get("/").headers


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_health_says_why_requests_are_not_taken(state: str) -> None:
    with client_of(FakeEngine(status=ready_status(state=state))) as client:
        answered = client.get("/health")
        assert client.head("/health").status_code == 503
    assert answered.status_code == 503
    assert answered.json()["status"] == state
    assert answered.json()["reason"]
    assert int(answered.headers["retry-after"]) >= 1


def test_key_guards_everything_but_health() -> None:
    with _guarded() as client:
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/chat/completions", json=HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"
        assert client.get("/nothing").status_code == 401
        assert client.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200


def test_pages_of_other_origins_are_kept_out_and_listed_ones_let_in() -> None:
    with _guarded(allow_origin=("https://chat.example",)) as client:
        evil = {"origin": "https://evil.example", "x-api-key": "secret"}
        refused = client.post(
            "/v1/chat/completions", content="{}", headers={**evil, "content-type": "text/plain"}
        )
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers
        assert client.get("/v1/models", headers=evil).status_code == 403
        good = {"origin": "https://chat.example", "x-api-key": "secret"}
        allowed = client.get("/v1/models", headers=good)
        assert allowed.status_code == 200
        assert allowed.headers.get_list("access-control-allow-origin") == ["https://chat.example"]
        preflight = client.options(
            "/v1/messages", headers={"origin": good["origin"], "access-control-request-method": "POST"}
        )
        assert preflight.status_code == 204
        assert preflight.headers.get_list("access-control-allow-origin") == ["https://chat.example"]
        assert "POST" in preflight.headers["access-control-allow-methods"]


def test_rebound_names_are_refused() -> None:
    with client_of(FakeEngine()) as client:
        refused = client.get("/v1/models", headers={"host": "evil.example:8080"})
    assert refused.status_code == 403
    assert "--allow-host" in refused.json()["error"]["message"]


def test_bodies_above_the_limit_are_refused_in_each_shape() -> None:
    app = create_app(FakeEngine(), ServeOptions(max_body="1kB"), None)
    with TestClient(app, base_url="http://127.0.0.1:8080") as client:
        large = {"messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 5}
        refused = client.post("/v1/chat/completions", json=large)
        assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")
        refused = client.post("/v1/messages", json=large)
        assert (refused.status_code, refused.json()["error"]["type"]) == (413, "request_too_large")
        assert client.post("/v1/chat/completions", json=HELLO).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("full", retry_after_s=7.4), 429, "7"),
        (EngineStopped("stopping", retry_after_s=0.1), 503, "1"),
        (EngineStopped("stopping"), 503, "5"),
    ],
)
def test_a_busy_server_says_when_to_ask_again(error: Exception, status: int, retry_after: str) -> None:
    with client_of(FakeEngine(refuse=error)) as client:  # type: ignore[arg-type]
        for path in ("/v1/chat/completions", "/v1/messages"):
            answered = client.post(path, json={**HELLO, "model": "m", "max_tokens": 5, "stream": True})
            assert (answered.status_code, answered.headers["retry-after"]) == (status, retry_after)


def test_an_unexpected_error_is_500_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeEngine):
        def log_lines(self, after: int = 0) -> tuple[LogLine, ...]:
            raise ValueError("/home/someone/secret")

    with client_of(Broken()) as client:
        answered = client.get("/optiq/log")
    assert answered.status_code == 500
    assert "secret" not in answered.text
    assert "secret" in caplog.text


def test_status_load_unload_and_clear() -> None:
    engine = FakeEngine()
    with client_of(engine) as client:
        assert client.get("/optiq/status").json()["models"][0]["id"] == "org/tiny"
        assert client.post("/optiq/models/load", json={"model": "other"}).status_code == 200
        assert client.post("/optiq/models/unload", json={"model": "other"}).json()["state"] == "ready"
        assert client.delete("/optiq/prefix-cache").json() == {"freed_nbytes": 4096}
        assert client.post("/optiq/models/load", json={"model": 5}).json()["error"]["param"] == "model"
    assert engine.called == ["load other", "unload other", "clear"]


def test_log_is_read_on_from_a_line() -> None:
    engine = FakeEngine()
    engine.log("one")
    engine.log("two")
    with client_of(engine) as client:
        assert [line["text"] for line in client.get("/optiq/log?after=1").json()["lines"]] == ["two"]
        assert client.get("/optiq/log?after=-1").status_code == 400
        engine.now = ready_status(state="draining")
        streamed = events_of(client.get("/optiq/log?after=0&stream=true").text)
        told = events_of(client.get("/optiq/events").text)
    assert [(name, msgspec.json.decode(data)["text"]) for name, data in streamed] == [
        ("line", "one"),
        ("line", "two"),
    ]
    assert [(name, msgspec.json.decode(data)["state"]) for name, data in told] == [("status", "draining")]


def test_metrics_tell_the_whole_status() -> None:
    row = RowStatus(
        id="a",
        model="m",
        adapter=None,
        state="decode",
        session="",
        prompt_tokens=5,
        cached_tokens=0,
        prefilled_tokens=5,
        completion_tokens=2,
        tokens_per_s=3.0,
        age_s=1.0,
    )
    now = msgspec.structs.replace(
        ready_status(),
        rows=(row,),
        kv_layers=(LayerBytes(name="model.layers.0", nbytes=77),),
        requests_finished={"stop": 3, "QueueFull": 1},
        adapter_requests={"terse": 2},
        time_to_first_token=LatencySum(bounds=(0.1, 1.0), counts=(4, 2, 1), total=3.5, number=7),
    )
    with client_of(FakeEngine(status=now)) as client:
        answered = client.get("/metrics")
    assert answered.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answered.text.splitlines()
    for line in (
        'optiq_state{state="ready"} 1.0',
        'optiq_rows{state="decode"} 1.0',
        'optiq_rows{state="queued"} 0.0',
        'optiq_kv_layer_bytes{layer="model.layers.0"} 77.0',
        'optiq_requests_finished_total{reason="QueueFull"} 1.0',
        'optiq_adapter_requests_total{adapter="terse"} 2.0',
        'optiq_time_to_first_token_seconds_bucket{le="0.1"} 4.0',
        'optiq_time_to_first_token_seconds_bucket{le="1.0"} 6.0',
        'optiq_time_to_first_token_seconds_bucket{le="+Inf"} 7.0',
        "optiq_time_to_first_token_seconds_count 7.0",
        "optiq_time_to_first_token_seconds_sum 3.5",
        "optiq_prefix_cache_hits_total 0.0",
    ):
        assert line in lines


def test_models_are_rows_of_both_dialects() -> None:
    with client_of(FakeEngine()) as client:
        plain = client.get("/v1/models").json()
        theirs = client.get("/v1/models?limit=1", headers={"anthropic-version": "2023-06-01"}).json()
        rest = client.get(f"/v1/models?after_id={theirs['last_id']}").json()
        one = client.get("/v1/models/org%2Ftiny").json()
        missing = client.get("/v1/models/none", headers={"anthropic-version": "2023-06-01"})
        assert client.get("/v1/models?limit=0").status_code == 400
    assert [row["id"] for row in plain["data"]] == ["org/tiny", "org/tiny@terse", "other"]
    assert plain["data"][0]["max_model_len"] == plain["data"][0]["context_length"] == 4096
    assert "max_tokens" not in plain["data"][0]
    assert "context_length" not in plain["data"][2]
    assert theirs["has_more"] is True
    assert theirs["data"][0]["max_tokens"] == 4096
    assert theirs["data"][0]["created_at"] == "2023-11-14T22:13:20Z"
    assert [row["id"] for row in rest["data"]] == ["org/tiny@terse", "other"]
    assert rest["has_more"] is False
    assert one["id"] == "org/tiny"
    assert missing.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("body", "model", "adapter"),
    [
        ({"model": "org/tiny@terse"}, "org/tiny", "terse"),
        ({"model": "terse"}, "org/tiny", "terse"),
        ({"model": "org/tiny", "adapter": "terse"}, "org/tiny", "terse"),
        ({"model": "claude-opus"}, "claude-opus", None),
        ({}, "", None),
    ],
)
def test_adapters_are_named_in_three_ways(body: dict[str, str], model: str, adapter: str | None) -> None:
    engine = FakeEngine()
    with client_of(engine) as client:
        assert client.post("/v1/chat/completions", json={**HELLO, **body}).status_code == 200
    assert (engine.requests[0].model, engine.requests[0].adapter) == (model, adapter)


def test_prefill_keeps_a_stream_alive_each_second() -> None:

    def script(request: object):  # type: ignore[no-untyped-def]
        steps = list(answer("done")(request))  # type: ignore[arg-type]
        yield steps[0]
        for _ in range(12):
            yield 0.2
            yield steps[1]
        yield from steps[2:]

    with client_of(FakeEngine(script)) as client:
        text = client.post("/v1/chat/completions", json={**HELLO, "stream": True}).text
    before = text[: text.index('"done"')]
    assert before.count(": keepalive\n\n") == 2
    assert before.count("data:") == 2
