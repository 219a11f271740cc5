"""The official anthropic SDK against a live server."""

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel
from support_engine import FakeEngine, Until, answer, call
from support_http import live

from mlx_optiq_ext.errors import EngineStopped, Overloaded, QueueFull
from mlx_optiq_ext.types.chat import Constraint, Text, ToolCall, ToolChoice, ToolResult
from mlx_optiq_ext.types.events import Started, TextDelta

ASKED: dict[str, Any] = {
    "model": "org/tiny",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "hi"}],
}
WEATHER = {"name": "get_weather", "description": "d", "input_schema": {"type": "object"}}


class Point(BaseModel):
    """What a parsed answer holds."""

    name: str
    n: int


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(answer("Hel", "lo"))


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[anthropic.Anthropic]:
    with (
        live(engine) as url,
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as sdk,
    ):
        yield sdk


def scripted(engine: FakeEngine, *scripts: Any) -> None:
    engine._scripts[:] = scripts


def test_create(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED)
    assert [block.text for block in message.content if block.type == "text"] == ["Hello"]
    assert message.stop_reason == "end_turn"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (36, 64)
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


def test_raw_stream_and_stream_helper(client: anthropic.Anthropic) -> None:
    kinds = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    with client.messages.stream(**ASKED) as stream:
        assert list(stream.text_stream) == ["Hel", "lo"]
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert (final.usage.output_tokens, final.usage.input_tokens) == (12, 36)


def test_tools_in_a_stream_and_whole(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    scripted(engine, answer(*call("get_weather", '{"city":', '"Oslo"}'), reason="tool_calls"))
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    message = client.messages.create(**ASKED, tools=[WEATHER], tool_choice=choice)  # type: ignore[call-overload]
    assert message.stop_reason == "tool_use"
    assert (message.content[0].name, message.content[0].input) == ("get_weather", {"city": "Oslo"})
    assert engine.requests[0].tool_choice == ToolChoice(mode="named", name="get_weather", parallel=False)
    with client.messages.stream(**ASKED, tools=[WEATHER]) as stream:  # type: ignore[list-item]
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        block = stream.get_final_message().content[0]
    assert partial == ['{"city":', '"Oslo"}']
    assert block.type == "tool_use"
    assert block.input == {"city": "Oslo"}


def test_thinking(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    scripted(engine, answer("yes", reasoning="let me see"))
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(**{**ASKED, "max_tokens": 2000}, thinking=thinking) as stream:  # type: ignore[arg-type]
        events = [event for event in stream if event.type in ("thinking", "signature")]
        message = stream.get_final_message()
    assert [event.type for event in events] == ["thinking", "signature"]
    block = message.content[0]
    assert block.type == "thinking"
    assert block.thinking == "let me see"
    assert block.signature
    assert engine.requests[0].reasoning.budget == 1024


def test_parse(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    scripted(engine, answer('{"name":"a",', '"n":1}'))
    message = client.messages.parse(**ASKED, output_format=Point)
    assert message.parsed_output == Point(name="a", n=1)
    constraint = engine.requests[0].constraint
    assert isinstance(constraint, Constraint)
    assert isinstance(constraint.value, dict)
    assert set(constraint.value["properties"]) == {"name", "n"}


def test_count_tokens(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(
        model="m", messages=[{"role": "user", "content": "one two three"}], system="s"
    )
    assert counted.input_tokens == 4


def test_models(client: anthropic.Anthropic) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed][:1] == ["org/tiny"]
    model = client.models.retrieve("org/tiny")
    assert (model.type, model.max_input_tokens) == ("model", 4096)
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody/nothing")


def test_tool_runner_goes_on_without_threads(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    """The server keeps no threads; the SDK has to learn it and send the whole conversation."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: the city
        """
        return f"sunny in {city}"

    scripted(
        engine, answer(*call("get_weather", '{"city":"Paris"}'), reason="tool_calls"), answer("It is sunny.")
    )
    final = client.beta.messages.tool_runner(**ASKED, tools=[get_weather]).until_done()
    assert [block.text for block in final.content if block.type == "text"] == ["It is sunny."]
    assert len(engine.requests) == 2
    asked, called, result = engine.requests[1].messages
    assert asked.parts == (Text(text="hi"),)
    assert isinstance(called.parts[0], ToolCall)
    assert isinstance(result.parts[0], ToolResult)
    assert result.parts[0].parts == (Text(text="sunny in Paris"),)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QueueFull("full", retry_after_s=7), anthropic.RateLimitError),
        (Overloaded("no memory"), anthropic.APIStatusError),
        (EngineStopped("draining"), anthropic.InternalServerError),
    ],
)
def test_errors_have_their_class_and_say_when_to_ask_again(
    client: anthropic.Anthropic, engine: FakeEngine, error: Any, kind: type[anthropic.APIStatusError]
) -> None:
    engine.refuse = error
    with pytest.raises(kind) as caught:
        client.messages.create(**ASKED)
    assert caught.value.status_code == type(error).status
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(kind), client.messages.stream(**ASKED) as stream:
        stream.until_done()


def test_a_wrong_value_is_a_bad_request(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**{**ASKED, "max_tokens": -1})


def test_a_client_that_leaves_a_stream_frees_its_row(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    scripted(engine, lambda _: [TextDelta(text="Hel"), Until()])
    with client.messages.stream(**ASKED) as stream:
        assert next(iter(stream.text_stream)) == "Hel"
    left(engine)


def test_a_client_that_gives_up_on_a_whole_answer_frees_its_row(
    client: anthropic.Anthropic, engine: FakeEngine
) -> None:
    scripted(engine, lambda _: [Started(cached_tokens=0), Until()])
    with pytest.raises(anthropic.APITimeoutError):
        client.messages.create(**ASKED, timeout=0.3)
    left(engine)


def left(engine: FakeEngine) -> None:
    deadline = time.monotonic() + 10
    while not engine.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.cancelled == ["job1"]


def test_a_slow_prefill_pings(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    scripted(engine, lambda _: [Started(cached_tokens=0), 1.2, *answer("late")(engine.requests[0])])
    told = client.messages.with_raw_response.create(**ASKED, stream=True).http_response
    text = "".join(told.iter_text())
    assert text.count("event: ping") >= 2
    assert text.index("event: message_start") < text.rindex("event: ping") < text.index("late")
