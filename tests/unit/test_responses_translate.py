"""What the engine is asked for a body of /v1/responses."""

from typing import Any

import msgspec
import pytest

from mlx_optiq_ext.errors import RequestError, UnknownName
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.responses.items import normalized
from mlx_optiq_ext.serve.responses.schema import NamedChoice, ResponsesRequest, Tool
from mlx_optiq_ext.serve.responses.to_generation import Conversation, session_of, to_generation
from mlx_optiq_ext.serve.responses.tools import Origin, ToolTable, tool_table
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
PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
WEATHER = Tool(type="function", name="weather", description="d", parameters=SCHEMA)


def asked_by(body: dict[str, Any]) -> ResponsesRequest:
    return msgspec.convert(body, ResponsesRequest)


def translated(**body: Any) -> Generation:
    request = asked_by({"input": "hi", **body})
    return to_generation(request, Conversation(own=normalized(request.input)), ToolTable(), ImageReader())


def texts(*words: str) -> tuple[Text, ...]:
    return tuple(Text(text=word) for word in words)


def test_a_plain_request_keeps_every_field() -> None:
    asked = translated(
        model="m",
        adapter="a",
        instructions="be brief",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        top_logprobs=3,
    )
    assert asked == Generation(
        model="m",
        adapter="a",
        messages=(
            Message(role="system", parts=texts("be brief")),
            Message(role="user", parts=texts("hi")),
        ),
        sampling=Sampling(
            temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.2, logprobs=3
        ),
        max_tokens=9,
    )


def test_log_probabilities_are_asked_for_by_number_or_by_include() -> None:
    assert translated().sampling.logprobs is None
    assert translated(top_logprobs=0).sampling.logprobs is None
    assert translated(include=["message.output_text.logprobs"]).sampling.logprobs == 0


def test_every_kind_of_item_becomes_a_part_of_its_turn() -> None:
    asked = translated(
        input=[
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"role": "system", "content": "more"},
            {"role": "user", "content": [{"type": "input_text", "text": "look"}, PICTURE]},
            {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
            },
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "spawn",
                "namespace": "agents",
                "arguments": '{"n": 1}',
            },
            {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
            {"type": "function_call_output", "call_id": "c1", "output": [PICTURE]},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
            {"role": "user", "content": "and?"},
        ]
    )
    shown, returned = (
        Image(data=b"hi", media_type="image/png", param=f"input[{place}].image_url")
        for place in ("2].content[1", "7].output[0")
    )
    assert asked.messages == (
        Message(role="system", parts=texts("rules", "more")),
        Message(role="user", parts=(Text(text="look"), shown)),
        Message(
            role="assistant",
            parts=(
                Reasoning(text="hm"),
                Text(text="I look."),
                ToolCall(id="c1", name="agents.spawn", arguments={"n": 1}),
                ToolCall(id="c2", name="patch", arguments={"input": "*** Begin"}),
            ),
        ),
        Message(
            role="tool",
            parts=(
                ToolResult(id="c1", name="agents.spawn", parts=(returned,)),
                ToolResult(id="c2", name="patch", parts=texts("done")),
            ),
        ),
        Message(role="user", parts=texts("and?")),
    )


def test_arguments_that_are_no_object_are_kept_as_they_are() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"cut'}
    assert translated(input=[call]).messages[0].parts[0] == ToolCall(
        id="c", name="f", arguments={"_raw": '{"cut'}
    )


@pytest.mark.parametrize(
    "item",
    [
        {"content": [{"type": "reasoning_text", "text": "deep"}], "encrypted_content": "other"},
        {"encrypted_content": conceal("deep"), "summary": [{"type": "summary_text", "text": "short"}]},
        {"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "deep"}]},
    ],
)
def test_reasoning_comes_back_from_where_it_is_fullest(item: dict[str, Any]) -> None:
    asked = translated(input=[{"type": "reasoning", "summary": [], **item}])
    assert asked.messages == (Message(role="assistant", parts=(Reasoning(text="deep"),)),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, Constraint(kind="json_object", param="text.format")),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
            Constraint(kind="json_schema", value=SCHEMA, param="text.format.schema"),
        ),
    ],
)
def test_every_form_of_answer(text: dict[str, Any], expected: Constraint | None) -> None:
    assert translated(text=text).constraint == expected


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        (None, ReasoningOptions()),
        ("none", ReasoningOptions(enabled=False)),
        ("minimal", ReasoningOptions(enabled=True, effort="minimal")),
        ("max", ReasoningOptions(enabled=True, effort="xhigh")),
    ],
)
def test_every_effort(effort: str | None, expected: ReasoningOptions) -> None:
    assert translated(reasoning={"effort": effort, "summary": "auto"}).reasoning == expected


def test_the_session_is_the_header_else_the_cache_key_else_the_user() -> None:
    named = asked_by({"prompt_cache_key": "k", "user": "u"})
    assert session_of(named, {"session-id": "h"}) == "h"
    assert session_of(named, {}) == "k"
    assert session_of(asked_by({"user": "u"}), {}) == "u"
    assert session_of(asked_by({}), {}) == ""


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{}]}, "input[0].id"),
        ({"input": [{"role": "assistant", "content": [PICTURE]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
    ],
)
def test_what_cannot_be_served_names_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        translated(**body)
    assert caught.value.param == param
    assert not isinstance(caught.value, UnknownName)


def test_namespaces_are_flattened_and_found_again() -> None:
    inner = [Tool(type="function", name="spawn", parameters=SCHEMA), Tool(type="function", name="weather")]
    namespace = Tool(type="namespace", name="agents", tools=inner)
    table = tool_table([WEATHER, namespace, Tool(type="web_search")], None)
    assert [spec.name for spec in table.specs] == ["weather", "agents.spawn", "agents.weather"]
    assert table.origin("agents.spawn") == Origin(name="spawn", namespace="agents")
    assert table.origin("weather") == Origin(name="weather")
    assert table.origin("invented") == Origin(name="invented")


def test_a_custom_tool_is_a_function_of_one_text() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}
    patch = msgspec.convert(
        {"type": "custom", "name": "patch", "description": "Edit.", "format": grammar}, Tool
    )
    table = tool_table([patch], NamedChoice(type="custom", name="patch"))
    (spec,) = table.specs
    assert spec.parameters["required"] == ["input"]
    assert spec.description.startswith("Edit.")
    assert "start: WORD" in spec.description
    assert table.choice == ToolChoice(mode="named", name="patch")
    assert table.origin("patch").custom


def test_allowed_tools_are_the_only_ones() -> None:
    other = Tool(type="function", name="other")
    allowed = NamedChoice(
        type="allowed_tools", mode="required", tools=[NamedChoice(type="function", name="weather")]
    )
    table = tool_table([WEATHER, other], allowed, parallel=False)
    assert [spec.name for spec in table.specs] == ["weather"]
    assert table.choice == ToolChoice(mode="required", parallel=False)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([Tool(type="function")], None, "tools[0].name"),
        ([WEATHER, WEATHER], None, "tools[1].name"),
        ([Tool(type="namespace", name="n", tools=[Tool(type="custom")])], None, "tools[0].tools[0].name"),
        ([], "required", "tool_choice"),
        ([WEATHER], NamedChoice(type="function", name="x"), "tool_choice"),
        ([WEATHER], NamedChoice(type="web_search_preview"), "tool_choice"),
    ],
)
def test_tools_that_cannot_be_called_name_their_field(
    tools: list[Tool], choice: str | NamedChoice | None, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        tool_table(tools, choice)
    assert caught.value.param == param
