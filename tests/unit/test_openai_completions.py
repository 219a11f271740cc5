"""Legacy completions and embeddings: what a request means, and the answers."""

import base64
import struct
from typing import Any

import msgspec
import pytest
from support_engine import FakeEngine, answer
from support_http import client_of, events_of, shown

from mlx_optiq_ext.types.events import TextDelta, TokenLogprob

VOLATILE = ("id", "created")


def _completed(engine: FakeEngine, **fields: Any) -> Any:
    with client_of(engine) as client:
        answered = client.post("/v1/completions", json=fields)
    assert answered.status_code == 200, answered.text
    return shown(answered.json(), *VOLATILE)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompts_have_four_forms(prompt: Any, prompts: list[Any]) -> None:
    engine = FakeEngine()
    document = _completed(engine, prompt=prompt, max_tokens=3, stop="x")
    assert [request.prompt for request in engine.requests] == prompts
    assert [choice["index"] for choice in document["choices"]] == list(range(len(prompts)))
    assert engine.requests[0].max_tokens == 3
    assert engine.requests[0].stop == ("x",)


def test_each_prompt_gets_n_answers_and_counts_once() -> None:
    document = _completed(FakeEngine(), prompt=["a", "b"], n=2, echo=True)
    assert [choice["text"] for choice in document["choices"]] == [
        "aHello world",
        "aHello world",
        "bHello world",
        "bHello world",
    ]
    assert document["usage"]["prompt_tokens"] == 200
    assert document["usage"]["completion_tokens"] == 48


def test_stream_of_a_completion() -> None:
    body = {"prompt": "a", "echo": True, "stream": True, "stream_options": {"include_usage": True}}
    with client_of(FakeEngine(answer("b", "c", reason="length"))) as client:
        text = client.post("/v1/completions", json=body).text
    *chunks, usage, done = [data for _, data in events_of(text)]
    told = [msgspec.json.decode(chunk)["choices"][0] for chunk in chunks]
    assert [(c["text"], c["finish_reason"]) for c in told] == [
        ("a", None),
        ("b", None),
        ("c", None),
        ("", "length"),
    ]
    assert msgspec.json.decode(usage)["usage"]["total_tokens"] == 112
    assert done == "[DONE]"


def test_log_probabilities_have_the_legacy_shape() -> None:
    first = TokenLogprob(token="ab", token_bytes=b"ab", logprob=-0.5)
    second = TokenLogprob(token="c", token_bytes=b"c", logprob=-1.5, top=(first,))
    script = answer(TextDelta(text="ab", logprobs=(first,)), TextDelta(text="c", logprobs=(second,)))
    expected = {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{}, {"ab": -0.5}],
        "text_offset": [0, 2],
    }
    assert _completed(FakeEngine(script), prompt="x", logprobs=1)["choices"][0]["logprobs"] == expected
    with client_of(FakeEngine(script)) as client:
        text = client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "stream": True}).text
    told = [msgspec.json.decode(data)["choices"][0] for _, data in events_of(text)[:-1]]
    assert [c["logprobs"]["text_offset"] for c in told if c["logprobs"]] == [[0], [2]]


def _embedded(**fields: Any) -> Any:
    with client_of(FakeEngine()) as client:
        return client.post("/v1/embeddings", json=fields)


def test_embeddings_as_numbers_and_as_base64() -> None:
    plain = _embedded(input=["abc", "de"], model="m").json()
    assert [row["embedding"] for row in plain["data"]] == [[3.0, 0.0, 3.0, 4.0], [2.0, 0.0, 3.0, 4.0]]
    assert plain["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert plain["model"] == "m"
    coded = _embedded(input=[1, 2], encoding_format="base64").json()["data"]
    assert struct.unpack("<4f", base64.b64decode(coded[0]["embedding"])) == (2.0, 0.0, 3.0, 4.0)


def test_shortened_embeddings_have_unit_length_again() -> None:
    row = _embedded(input="abcd", dimensions=3).json()["data"][0]["embedding"]
    assert row == pytest.approx([0.8, 0.0, 0.6])
    refused = _embedded(input="abcd", dimensions=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
