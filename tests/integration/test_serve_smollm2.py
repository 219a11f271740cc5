"""The official SDKs against a live server on the real small model."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pydantic
import pytest

pytestmark = pytest.mark.model

QUESTION = "What is the capital of France? Answer in one short sentence."
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class City(pydantic.BaseModel):
    name: str
    inhabitants: int
    is_capital: bool


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "mlx_optiq_ext", "serve", "--model", str(smollm2)]
    command += ["--port", "0", "--json", "--max-rows", "4", "--memory", "6GB", "--alias", "claude-local"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == "}":
            break
    if not lines:
        pytest.fail(process.communicate()[1][-3000:])
    yield json.loads("".join(lines))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, "SIGTERM is a clean stop"


@pytest.fixture(scope="module")
def gpt(served: dict[str, Any]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served['url']}/v1", api_key="any", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def claude(served: dict[str, Any]) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served["url"], api_key="any", max_retries=0, timeout=300)


def _greedy(**changed: Any) -> dict[str, Any]:
    return {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        **changed,
    }


def test_what_is_on_is_printed(served: dict[str, Any]) -> None:
    [model] = served["models"]
    assert model["loaded"]
    assert model["context"] == 8192
    assert not served["needs_key"]


def test_chat_whole_and_streaming_say_the_same(gpt: openai.OpenAI) -> None:
    whole = gpt.chat.completions.create(**_greedy(max_tokens=24))
    said = whole.choices[0].message.content or ""
    assert "Paris" in said
    assert whole.choices[0].finish_reason == "stop"
    pieces = list(
        gpt.chat.completions.create(
            **_greedy(max_tokens=24, stream=True, stream_options={"include_usage": True})
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == said
    assert [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason] == [
        "stop"
    ]
    usage = pieces[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_three_protocols_count_the_same_tokens_and_say_the_same(
    gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    chat = gpt.chat.completions.create(**_greedy(max_tokens=24))
    response = gpt.responses.create(model="x", input=QUESTION, max_output_tokens=24, temperature=0)
    message = claude.messages.create(
        model="claude-local", max_tokens=24, messages=messages, extra_body={"temperature": 0}
    )
    counted = claude.messages.count_tokens(model="claude-local", messages=messages).input_tokens
    text = chat.choices[0].message.content
    assert response.output_text == text
    assert message.content[0].text == text
    assert chat.usage is not None
    assert response.usage is not None
    read = message.usage.cache_read_input_tokens or 0
    assert (
        chat.usage.prompt_tokens
        == response.usage.input_tokens
        == message.usage.input_tokens + read
        == counted
    )


def test_structured_output_parses(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    asked = [{"role": "user", "content": "Describe Paris as JSON."}]
    parsed = gpt.chat.completions.parse(model="x", messages=asked, response_format=City, max_tokens=200)
    if parsed.choices[0].finish_reason == "stop":
        assert isinstance(parsed.choices[0].message.parsed, City)
    by_response = gpt.responses.parse(
        model="x", input="Describe Paris.", text_format=City, max_output_tokens=200
    )
    if by_response.status == "completed":
        assert isinstance(by_response.output_parsed, City)
    message = claude.messages.parse(model="x", max_tokens=200, messages=asked, output_format=City)
    if message.stop_reason == "end_turn":
        assert isinstance(message.parsed_output, City)


def test_a_required_tool_is_called_on_all_protocols(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    asked = [{"role": "user", "content": "What will the weather be in Oslo for 3 days?"}]
    function = {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER}
    chat = gpt.chat.completions.create(
        model="x",
        messages=asked,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        temperature=0,
    )
    assert chat.choices[0].finish_reason == "tool_calls"
    [call] = chat.choices[0].message.tool_calls or []
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert isinstance(arguments["days"], int)
    response = gpt.responses.create(
        model="x",
        input=asked,
        tools=[{"type": "function", **function, "strict": True}],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=120,
        temperature=0,
    )
    assert [item.name for item in response.output if item.type == "function_call"][:1] == ["get_weather"]
    with claude.messages.stream(
        model="x",
        max_tokens=120,
        messages=asked,
        tools=[{"name": "get_weather", "description": "Weather of a city.", "input_schema": WEATHER}],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        extra_body={"temperature": 0},
    ) as stream:
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    [use] = [block for block in message.content if block.type == "tool_use"]
    assert set(use.input) == {"city", "days"}


def test_a_conversation_is_kept_and_continued(gpt: openai.OpenAI) -> None:
    first = gpt.responses.create(model="x", input=QUESTION, max_output_tokens=40, temperature=0)
    with gpt.responses.stream(
        model="x",
        input="And of Italy? One short sentence.",
        previous_response_id=first.id,
        max_output_tokens=200,
        temperature=0,
    ) as stream:
        second = stream.get_final_response()
    assert second.previous_response_id == first.id
    assert gpt.responses.retrieve(second.id).output_text == second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0
    gpt.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(first.id)


def test_models_embeddings_and_refusals(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    [row] = gpt.models.list().data
    assert gpt.models.retrieve(row.id).id == row.id
    assert claude.models.list().data[0].id == row.id
    near, same, far = (
        each.embedding
        for each in gpt.embeddings.create(
            model="x", input=["A cat sleeps.", "A kitten naps.", "Stock prices fell by 3 % in March."]
        ).data
    )

    def cosine(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True))

    assert cosine(near, near) == pytest.approx(1, abs=1e-3)
    assert cosine(near, same) > cosine(near, far)
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.chat.completions.create(**_greedy(messages=[{"role": "user", "content": "word " * 9000}]))
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 8192 maximum"):
        claude.messages.create(
            model="x", max_tokens=9, messages=[{"role": "user", "content": "word " * 9000}]
        )


def test_a_stop_string_and_log_probabilities(gpt: openai.OpenAI) -> None:
    stopped = gpt.chat.completions.create(**_greedy(max_tokens=24, stop=[" Paris"]))
    assert "Paris" not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"
    scored = gpt.chat.completions.create(**_greedy(max_tokens=6, logprobs=True, top_logprobs=3))
    assert scored.choices[0].logprobs is not None
    tokens = scored.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == scored.choices[0].message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-4)
        assert token.logprob <= 0


def test_health_and_metrics(served: dict[str, Any]) -> None:
    assert httpx.get(f"{served['url']}/health").status_code == 200
    metrics = httpx.get(f"{served['url']}/metrics").text
    assert "optiq_" in metrics
    assert httpx.get(f"{served['url']}/schema/openapi.json").json()["openapi"].startswith("3.")
