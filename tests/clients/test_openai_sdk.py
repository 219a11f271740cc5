"""The official openai package against the server on a loopback port."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from support_engine import CALL_ID, FakeEngine, Script, Until, answer, call
from support_http import live

from mlx_optiq_ext.errors import PromptTooLong, QueueFull
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, Failed

HI: Any = [{"role": "user", "content": "hi"}]


class Point(BaseModel):
    """What parse() asks for."""

    name: str
    n: int


class GetWeather(BaseModel):
    """A tool."""

    city: str


class Asked:
    """A client and the engine that it reaches."""

    def __init__(self, url: str, engine: FakeEngine) -> None:
        self.engine = engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="local", max_retries=0)


@pytest.fixture
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    script: Script = getattr(request, "param", None) or answer("Hello", " world", reasoning="hm")
    engine = FakeEngine(script)
    with live(engine) as url:
        yield Asked(url, engine)


def test_create(asked: Asked) -> None:
    made = asked.client.chat.completions.create(
        model="org/tiny",
        messages=HI,
        max_tokens=5,
        temperature=0.5,
        seed=3,
        stop=["x"],
        user="me",
    )
    assert made.choices[0].message.content == "Hello world"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage is not None
    assert made.usage.prompt_tokens_details is not None
    assert (made.usage.prompt_tokens, made.usage.prompt_tokens_details.cached_tokens) == (100, 64)
    assert made.choices[0].message.model_extra == {"reasoning_content": "hm"}
    assert asked.engine.requests[0].max_tokens == 5


def test_stream(asked: Asked) -> None:
    chunks = list(
        asked.client.chat.completions.create(
            model="m",
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "Hello world"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 112
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]


def test_stream_helper_gathers_the_answer(asked: Asked) -> None:
    with asked.client.chat.completions.stream(model="m", messages=HI) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        made = stream.get_final_completion()
    assert deltas == ["", "Hello", " world"]
    assert made.choices[0].message.content == "Hello world"


TOOLS_SCRIPT = answer(
    *call("GetWeather", '{"city":', '"Berlin"}'),
    *call("GetWeather", '{"city":"Rome"}', index=1, id=f"{CALL_ID}2"),
    reason="tool_calls",
)


@pytest.mark.parametrize("asked", [TOOLS_SCRIPT], indirect=True)
def test_tool_calls_stream_and_are_parsed(asked: Asked) -> None:
    tools = [openai.pydantic_function_tool(GetWeather)]
    with asked.client.chat.completions.stream(model="m", messages=HI, tools=tools) as stream:
        deltas = [e.arguments_delta for e in stream if e.type == "tool_calls.function.arguments.delta"]
        made = stream.get_final_completion()
    assert deltas == ["", '{"city":', '"Berlin"}', "", '{"city":"Rome"}']
    calls = made.choices[0].message.tool_calls or []
    assert [c.function.parsed_arguments for c in calls] == [
        GetWeather(city="Berlin"),
        GetWeather(city="Rome"),
    ]
    assert made.choices[0].finish_reason == "tool_calls"
    whole = asked.client.chat.completions.create(model="m", messages=HI, tools=tools)
    whole_calls: Any = whole.choices[0].message.to_dict()["tool_calls"]
    assert [json.loads(c["function"]["arguments"])["city"] for c in whole_calls] == ["Berlin", "Rome"]
    assert whole.choices[0].message.content is None


@pytest.mark.parametrize("asked", [answer('{"name":"a",', '"n":1}')], indirect=True)
def test_parse(asked: Asked) -> None:
    made = asked.client.chat.completions.parse(model="m", messages=HI, response_format=Point)
    assert made.choices[0].message.parsed == Point(name="a", n=1)
    constraint = asked.engine.requests[0].constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert isinstance(constraint.value, dict)
    assert constraint.value["required"] == ["name", "n"]


def _too_long(request: Generation) -> list[Event]:
    return [Failed.of(PromptTooLong(5000, 4096))]


@pytest.mark.parametrize("asked", [_too_long], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long(asked: Asked, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        asked.client.chat.completions.create(model="m", messages=HI, stream=stream)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("asked", [answer("a", Failed.of(QueueFull("later")))], indirect=True)
def test_an_error_in_the_middle_of_a_stream(asked: Asked) -> None:
    with pytest.raises(openai.APIError, match="later"):
        list(asked.client.chat.completions.create(model="m", messages=HI, stream=True))


def test_refusals_have_their_classes(asked: Asked) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        asked.client.chat.completions.create(model="m", messages=HI, temperature=9)
    assert caught.value.param == "temperature"
    asked.engine.refuse = QueueFull("full", retry_after_s=3)
    with pytest.raises(openai.RateLimitError) as limited:
        asked.client.chat.completions.create(model="m", messages=HI)
    assert limited.value.response.headers["retry-after"] == "3"


def test_models(asked: Asked) -> None:
    assert [model.id for model in asked.client.models.list()] == ["org/tiny", "org/tiny@terse", "other"]
    assert asked.client.models.retrieve("org/tiny").created == 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        asked.client.models.retrieve("none")


def test_embeddings(asked: Asked) -> None:
    made = asked.client.embeddings.create(model="m", input=["abc", "de"])
    assert [row.embedding for row in made.data] == [[3.0, 0.0, 3.0, 4.0], [2.0, 0.0, 3.0, 4.0]]


def test_legacy_completions(asked: Asked) -> None:
    made = asked.client.completions.create(model="m", prompt="Once", echo=True)
    assert made.choices[0].text == "OncehmHello world"
    streamed = asked.client.completions.create(model="m", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "hmHello world"


def test_paths_that_are_not_served(asked: Asked) -> None:
    with pytest.raises(openai.NotFoundError):
        asked.client.files.list()


def test_leaving_a_stream_cancels_the_job() -> None:
    def endless(request: Generation) -> Iterator[Event | float | Until]:
        yield from list(answer("a")(request))[:-1]
        for _ in range(2000):
            yield 0.01

    engine = FakeEngine(endless)
    with live(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="local", max_retries=0)
        stream = client.chat.completions.create(model="m", messages=HI, stream=True)
        next(iter(stream))
        stream.close()
        for _ in range(500):
            if engine.cancelled:
                break
            httpx.get(f"{url}/health")
    assert engine.cancelled == ["job1"]
