"""The official openai SDK's responses against a live server."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel
from support_engine import FakeEngine, answer, call
from support_http import live

from mlx_optiq_ext.errors import QueueFull
from mlx_optiq_ext.types.chat import Constraint

ASKED: dict[str, Any] = {"model": "org/tiny", "input": "hi"}


class Point(BaseModel):
    """What a parsed answer holds."""

    name: str
    n: int


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(answer("Hel", "lo"))


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with (
        live(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as sdk,
    ):
        yield sdk


def scripted(engine: FakeEngine, *scripts: Any) -> None:
    engine._scripts[:] = scripts


def test_create(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED, instructions="be brief")
    assert response.output_text == "Hello"
    assert response.status == "completed"
    assert response.instructions == "be brief"
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 64
    # Strict: every field has the type that the SDK's model says.
    assert type(response).model_validate(response.model_dump()) == response


def test_raw_stream_and_stream_helper(client: openai.OpenAI) -> None:
    kinds = [event.type for event in client.responses.create(**ASKED, stream=True)]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    with client.responses.stream(**ASKED) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert deltas == ["Hel", "lo"]
    assert final.output_text == "Hello"


def test_parse_whole_and_in_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    scripted(engine, answer('{"name":"a",', '"n":1}'))
    assert client.responses.parse(**ASKED, text_format=Point).output_parsed == Point(name="a", n=1)
    with client.responses.stream(**ASKED, text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(name="a", n=1)
    for asked in engine.requests:
        assert isinstance(asked.constraint, Constraint)
        assert asked.constraint.kind == "json_schema"


def test_tools_in_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    scripted(engine, answer("I look.", *call("Point", '{"name":"a",', '"n":1}'), reason="tool_calls"))
    tool = openai.pydantic_function_tool(Point)["function"]
    function: Any = {"type": "function", **tool}
    with client.responses.stream(**ASKED, tools=[function]) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert snapshots == ['{"name":"a",', '{"name":"a","n":1}']
    made = final.output[1]
    assert isinstance(made, ResponseFunctionToolCall)
    assert (made.name, made.arguments) == ("Point", '{"name":"a","n":1}')
    answered: Any = {"type": "function_call_output", "call_id": made.call_id, "output": "ok"}
    scripted(engine, answer("done"))
    response = client.responses.create(model="m", previous_response_id=final.id, input=[answered])
    assert response.output_text == "done"
    assert [message.role for message in engine.requests[-1].messages] == ["user", "assistant", "tool"]


def test_reasoning(client: openai.OpenAI, engine: FakeEngine) -> None:
    scripted(engine, answer("yes", reasoning="let me see"))
    with client.responses.stream(**ASKED, reasoning={"effort": "low", "summary": "auto"}) as stream:
        deltas = [e.delta for e in stream if e.type == "response.reasoning_summary_text.delta"]
        item = stream.get_final_response().output[0]
    assert deltas == ["let me see"]
    assert item.type == "reasoning"
    assert item.summary[0].text == "let me see"
    assert engine.requests[0].reasoning.effort == "low"


def test_retrieve_input_items_input_tokens_and_delete(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASKED)
    assert client.responses.retrieve(made.id).output_text == "Hello"
    items = list(client.responses.input_items.list(made.id))
    assert [item.type for item in items] == ["message"]
    assert client.responses.input_tokens.count(**ASKED).input_tokens == 1
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASKED, previous_response_id=made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.compact(model="m")


def test_errors_have_their_class_and_name_the_field(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.responses.create(**ASKED, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as background:
        client.responses.create(**ASKED, background=True)
    assert background.value.param == "background"
    engine.refuse = QueueFull("full", retry_after_s=7)
    with pytest.raises(openai.RateLimitError) as full:
        client.responses.create(**ASKED)
    assert full.value.response.headers["retry-after"] == "7"
