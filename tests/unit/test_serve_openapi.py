"""The API's description: every body and every answer has its type, and answers are of that type."""

from typing import Any

import msgspec
import pytest
from support_engine import FakeEngine, answer, call
from support_http import client_of

from mlx_optiq_ext.serve.anthropic.answers import AnthropicError
from mlx_optiq_ext.serve.openai.answers import OpenAIError
from mlx_optiq_ext.serve.openapi import ANSWERS
from mlx_optiq_ext.serve.responses.answers import ItemPage, ResponseObject
from mlx_optiq_ext.types.events import TextDelta, TokenLogprob

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "object", "properties": {}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER, "logprobs": True},
    "/v1/completions": {"prompt": "hi", "logprobs": 1},
    "/v1/embeddings": {"input": "hi"},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": USER},
    "/v1/messages/count_tokens": {"model": "m", "messages": USER},
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": TOOL}]},
    "/v1/responses/input_tokens": {"input": "hi"},
}
TOP = TokenLogprob(token="b", token_bytes=b"b", logprob=-1.0)
TALKATIVE = answer(
    TextDelta(text="a", logprobs=(TokenLogprob(token="a", token_bytes=b"a", logprob=-0.5, top=(TOP,)),)),
    *call("f", '{"x": 1}'),
    reason="tool_calls",
    reasoning="hm",
)


def _schema() -> Any:
    with client_of(FakeEngine()) as client:
        return client.get("/schema").json()


def test_every_operation_says_what_it_takes_and_answers() -> None:
    document = _schema()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method == "head" or path.endswith(("/compact", "/cancel")):
                continue
            good = [each for status, each in operation["responses"].items() if status.startswith("2")]
            schemas = [media["schema"] for each in good for media in each["content"].values()]
            assert schemas, (method, path)
            assert all(schemas), (method, path)
            (error,) = operation["responses"]["default"]["content"].values()
            assert error["schema"]["$ref"].endswith("Error")
            assert (method == "post") == ("requestBody" in operation), (method, path)
    assert "cdn" not in str(document)


@pytest.mark.parametrize(("method", "path"), [key for key in ANSWERS if "{response_id}" not in key[1]])
def test_answers_are_of_the_type_that_is_described(method: str, path: str) -> None:
    engine = FakeEngine(TALKATIVE)
    engine.log("one")
    with client_of(engine) as client:
        if method == "post":
            answered = client.post(path, json=BODIES[path])
        else:
            answered = client.request(method, path.replace("{name}", "org/tiny@terse"))
    assert answered.status_code == 200
    _check(answered.json(), ANSWERS[method, path])


def test_answers_about_stored_responses_are_of_the_type_that_is_described() -> None:
    with client_of(FakeEngine()) as client:
        name = client.post("/v1/responses", json=BODIES["/v1/responses"]).json()["id"]
        for method, path in ANSWERS:
            if "{response_id}" in path and method == "get":
                _check(client.get(path.format(response_id=name)).json(), ANSWERS[method, path])
        path = "/v1/responses/{response_id}"
        _check(client.delete(path.format(response_id=name)).json(), ANSWERS["delete", path])


def test_models_are_described_to_clients_of_either_dialect() -> None:
    with client_of(FakeEngine()) as client:
        answered = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})
    _check(answered.json(), ANSWERS["get", "/v1/models"])


def test_errors_are_of_the_type_that_is_described() -> None:
    with client_of(FakeEngine()) as client:
        for path, kind in (("/v1/messages", AnthropicError), ("/v1/chat/completions", OpenAIError)):
            _check(client.post(path, json={}).json(), kind)
        _check(
            client.post("/v1/messages", json={**BODIES["/v1/messages"], "thread": {}}).json(), AnthropicError
        )


def _check(document: Any, kind: type[msgspec.Struct]) -> None:
    """Every field of the document is one of the type's, and has its type."""
    again = msgspec.json.decode(msgspec.json.encode(msgspec.convert(document, kind)))
    if kind in (ResponseObject, ItemPage):
        # Items leave out what they do not have.
        assert again.keys() == document.keys()
    else:
        assert again == document
