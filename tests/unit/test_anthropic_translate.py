"""What the engine is asked for a body of /v1/messages."""

import base64
from typing import Any

import msgspec
import pytest

from mlx_optiq_ext.errors import RequestError
from mlx_optiq_ext.serve.anthropic.schema import CountTokensRequest, MessagesRequest
from mlx_optiq_ext.serve.anthropic.to_generation import ThreadUnsupported, session_of, to_generation
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.unseen import conceal
from mlx_optiq_ext.types.chat import (
    Constraint,
    Generation,
    Image,
    Message,
    Reasoning,
    ReasoningOptions,
    Sampling,
    Text,
    ToolCall,
    ToolChoice,
    ToolResult,
)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "d", "input_schema": SCHEMA}


def translated(**fields: Any) -> Generation:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    return to_generation(msgspec.convert(body, MessagesRequest), ImageReader(), "s")


def texts(*words: str) -> tuple[Text, ...]:
    return tuple(Text(text=word) for word in words)


def test_a_plain_request_keeps_every_field() -> None:
    asked = translated(
        system="be brief", stop_sequences=["END"], temperature=0.5, top_p=0.9, top_k=7, adapter="a"
    )
    assert asked == Generation(
        model="m",
        adapter="a",
        messages=(
            Message(role="system", parts=texts("be brief")),
            Message(role="user", parts=texts("hi")),
        ),
        sampling=Sampling(temperature=0.5, top_p=0.9, top_k=7),
        stop=("END",),
        max_tokens=9,
        session="s",
    )


def test_a_string_and_a_list_of_one_block_are_the_same() -> None:
    block = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    assert translated(messages=[{"role": "user", "content": [block]}]) == translated()


def test_the_billing_line_never_reaches_the_prompt() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2.3.abc; cc_entrypoint=cli;"}
    with_line = translated(system=[billing, {"type": "text", "text": "rules"}])
    assert with_line == translated(system="rules")


def test_system_messages_keep_their_places() -> None:
    asked = translated(
        system="rules",
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "system", "content": "environment"},
            {"role": "assistant", "content": "hello"},
            {"role": "system", "content": [{"type": "text", "text": "reminder"}]},
            {"role": "user", "content": "go on"},
        ],
    )
    assert asked.messages == (
        Message(role="system", parts=texts("rules")),
        Message(role="user", parts=texts("hi")),
        Message(role="system", parts=texts("environment")),
        Message(role="assistant", parts=texts("hello")),
        Message(role="system", parts=texts("reminder")),
        Message(role="user", parts=texts("go on")),
    )


def test_results_become_tool_messages_with_the_name_of_their_call() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    asked = translated(
        messages=[
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "sig"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                    {"type": "tool_use", "id": "t2", "name": "read", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                    {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [picture]},
                    {"type": "text", "text": "and?"},
                ],
            },
        ]
    )
    place = "messages[2].content[1].content[0].source.data"
    shown = Image(data=b"hi", media_type="image/png", param=place)
    assert asked.messages[1:] == (
        Message(
            role="assistant",
            parts=(
                Reasoning(text="hm", signature="sig"),
                Text(text="I look."),
                ToolCall(id="t1", name="weather", arguments={"city": "Oslo"}),
                ToolCall(id="t2", name="read", arguments={}),
            ),
        ),
        Message(
            role="tool",
            parts=(
                ToolResult(id="t1", name="weather", parts=texts("sun")),
                ToolResult(id="t2", name="read", is_error=True, parts=(shown,)),
            ),
        ),
        Message(role="user", parts=texts("and?")),
    )


def test_thoughts_that_were_omitted_come_back_from_their_signature() -> None:
    thinking = {"type": "thinking", "thinking": "", "signature": conceal("deep")}
    foreign = {"type": "thinking", "thinking": "", "signature": "EqoB"}
    answer = {"role": "assistant", "content": [foreign, thinking, {"type": "text", "text": "yes"}]}
    asked = translated(messages=[{"role": "user", "content": "hi"}, answer])
    assert asked.messages[1].parts == (
        Reasoning(text="deep", signature=conceal("deep")),
        Text(text="yes"),
    )


def test_a_tool_reference_becomes_the_definition_of_its_tool_and_the_tool_is_deferred() -> None:
    placeholder = {"name": "DeferredToolPlaceholder", "input_schema": {}, "defer_loading": True}
    found = {**WEATHER, "defer_loading": True}
    searched = [{"type": "tool_reference", "tool_name": "weather"}]
    asked = translated(
        tools=[found, placeholder, {"type": "web_search_20250305", "name": "web_search"}],
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "find", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": searched}]},
        ],
    )
    assert [(tool.name, tool.deferred) for tool in asked.tools] == [("weather", True)]
    result = asked.messages[-1].parts[0]
    assert isinstance(result, ToolResult)
    (definition,) = result.parts
    assert isinstance(definition, Text)
    assert msgspec.json.decode(definition.text) == {
        "type": "function",
        "function": {"name": "weather", "description": "d", "parameters": SCHEMA},
    }


def test_documents_of_text_and_search_results_keep_their_words() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "body"}
    found = {
        "type": "search_result",
        "source": "s",
        "title": "t",
        "content": [{"type": "text", "text": "w"}],
    }
    content = [{"type": "document", "title": "T", "source": source}, found]
    asked = translated(messages=[{"role": "user", "content": content}])
    assert asked.messages == (Message(role="user", parts=texts("T\nbody", "t\ns\nw")),)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ToolChoice()),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice(parallel=False)),
        ({"type": "any"}, ToolChoice(mode="required")),
        ({"type": "none"}, ToolChoice(mode="none")),
        ({"type": "tool", "name": "weather"}, ToolChoice(mode="named", name="weather")),
    ],
)
def test_every_tool_choice(choice: dict[str, Any], expected: ToolChoice) -> None:
    assert translated(tools=[WEATHER], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ReasoningOptions()),
        ({"thinking": {"type": "disabled"}}, ReasoningOptions(enabled=False)),
        ({"thinking": {"type": "adaptive", "display": "updates"}}, ReasoningOptions(enabled=True)),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            ReasoningOptions(enabled=True, budget=1024),
        ),
        ({"output_config": {"effort": "max"}}, ReasoningOptions(effort="xhigh")),
    ],
)
def test_every_way_to_ask_for_thinking(fields: dict[str, Any], expected: ReasoningOptions) -> None:
    assert translated(**fields).reasoning == expected


def test_a_schema_constrains_the_answer() -> None:
    asked = translated(output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert asked.constraint == Constraint(
        kind="json_schema", value=SCHEMA, param="output_config.format.schema"
    )


def test_the_session_is_the_header_else_the_session_in_the_user_id() -> None:
    def session(user: str | None, **headers: str) -> str:
        body = {"model": "m", "messages": [], "metadata": {"user_id": user}}
        return session_of(msgspec.convert(body, CountTokensRequest), headers)

    assert session("u", **{"x-claude-code-session-id": "h"}) == "h"
    assert session('{"device_id":"d","session_id":"one"}') == "one"
    assert session('{"device_id":"d"}') == '{"device_id":"d"}'
    assert session("{broken") == "{broken"
    assert session(None) == ""


def said(role: str, **block: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [block]}]}


GONE = {"type": "tool_reference", "tool_name": "gone"}
BROKEN = {"type": "base64", "media_type": "image/png", "data": "%%"}
REMOTE = {"type": "url", "url": "http://127.0.0.1/x.png"}
BLOCK = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        (said("user", type="tool_use", id="a", name="b", input={}), BLOCK),
        (said("assistant", type="tool_result", tool_use_id="a"), BLOCK),
        (said("system", type="thinking", thinking="x"), BLOCK),
        (said("user", type="tool_result", tool_use_id="a", content=[GONE]), f"{BLOCK}.content[0].tool_name"),
        (said("user", type="image", source=BROKEN), f"{BLOCK}.source.data"),
        (said("user", type="image", source=REMOTE), f"{BLOCK}.source.url"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ],
)
def test_what_cannot_be_served_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        translated(**fields)
    assert caught.value.param == param


def test_a_thread_is_refused_by_its_own_kind() -> None:
    with pytest.raises(ThreadUnsupported):
        translated(thread={"type": "create"})


def test_a_remote_picture_is_read_by_the_reader_of_the_server() -> None:
    data = base64.b64encode(b"pixels").decode()
    url = f"data:image/jpeg;base64,{data}"
    block = {"type": "image", "source": {"type": "url", "url": url}}
    asked = translated(messages=[{"role": "user", "content": [block]}])
    assert asked.messages[0].parts == (
        Image(data=b"pixels", media_type="image/jpeg", param="messages[0].content[0].source.url"),
    )
