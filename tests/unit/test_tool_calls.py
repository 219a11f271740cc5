"""Tool calls of every family: read while they are written, repaired, never dropped."""

import importlib
import json
from pathlib import Path

import mlx_lm.tool_parsers
import pytest
from support_answers import TOOLS, calls, cut_call, decoded, reasoning, texts, wrapper
from support_calls import ANSWERS, CALLS, JSON_CALLS

from mlx_optiq_ext.types.chat import Constraint, Generation, ToolChoice
from mlx_optiq_ext.types.events import ToolCallDelta, ToolCallStart

FAMILIES = sorted(ANSWERS)


def expected(family: str) -> list[tuple[str, dict]]:
    """What was written; the one format without nested values leaves the list out."""
    if family != "function_gemma":
        return CALLS
    return [CALLS[0], (CALLS[1][0], {k: v for k, v in CALLS[1][1].items() if k != "lines"})]


def test_every_parser_of_mlx_lm_is_covered():
    modules = {path.stem for path in Path(mlx_lm.tool_parsers.__file__).parent.glob("[a-z]*.py")}
    assert modules == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_read_token_by_token(family):
    events = decoded(ANSWERS[family], wrapper(family))
    found = [(name, json.loads(arguments)) for name, arguments in calls(events)]
    assert found == expected(family)
    assert texts(events) == ""
    # Arguments are written in one form, whatever the family's is.
    assert [arguments for _, arguments in calls(events)] == [
        json.dumps(arguments, ensure_ascii=False) for _, arguments in expected(family)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_reasoning_around_calls_stay_apart(family):
    answer = f"<think>\nLet me see.</think>\n\nI will look.\n{ANSWERS[family]}"
    events = decoded(answer, wrapper(family, thinks=True))
    assert reasoning(events) == "Let me see."
    assert texts(events) == "I will look."
    assert [name for name, _ in calls(events)] == ["get_weather", "write_file"]


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_arrive_while_they_are_written(family):
    wrapped = wrapper(family)
    text = ANSWERS[family]
    events = decoded(text[: text.index("</b>")], wrapped, reason="length")
    deltas = [event for event in events if isinstance(event, ToolCallDelta) and event.index == 1]
    # Code-like calls tell an argument when it is complete, all others tell a string as it comes.
    assert len(deltas) > (0 if family == "pythonic" else 10)
    assert [name for name, _ in calls(events, is_cut=True)] == ["get_weather"]
    cut = cut_call(events)
    assert cut is not None
    assert cut[0] == "write_file"
    assert '"a/b.py"' in cut[1] or family == "pythonic"
    with pytest.raises(ValueError, match=r"."):
        json.loads(cut[1])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in {"mistral"}])
def test_a_missing_end_marker_at_the_end_of_the_turn_is_forgiven(family):
    end = importlib.import_module(f"mlx_lm.tool_parsers.{family}").tool_call_end
    events = decoded(ANSWERS[family].rstrip().removesuffix(end), wrapper(family))
    assert [(name, json.loads(arguments)) for name, arguments in calls(events)] == expected(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_ends_no_call_that_the_model_had_not_ended(family):
    wrapped = wrapper(family)
    text = ANSWERS[family]
    whole = expected(family)
    for reason in ("length", "cancelled"):
        for cut in range(0, len(text), 3):
            events = decoded(text[:cut], wrapped, reason=reason)
            ended = [(name, json.loads(arguments)) for name, arguments in calls(events, is_cut=True)]
            assert ended == whole[: len(ended)], "what ended is what was meant, all of it"
            begun = cut_call(events)
            if begun is not None:
                assert begun[0] == whole[len(ended)][0]
                with pytest.raises(ValueError, match=r"."):
                    json.loads(begun[1])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "get_weather", "arguments": {"city": "Bern", "days": "3",}}', {"city": "Bern", "days": 3}),
        ('{"name": "get_weather", "arguments": {"city": "Bern"', {"city": "Bern"}),
        ('{"name": "get_weather", "arguments": {"city": "Be', {"city": "Be"}),
        ("{'name': 'get_weather', 'arguments': {'city': \"Bern\", 'x': None}}", {"city": "Bern", "x": None}),
        ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Bern\\"}"}', {"city": "Bern"}),
        ('{"name": "GET_Weather", "parameters": {"city": 5}}', {"city": "5"}),
        ('{"arguments": {"city": "Bern"}, "name": "get_weather"}', {"city": "Bern"}),
        ('{"function": {"name": "get_weather", "arguments": {"city": "Bern"}}}', {"city": "Bern"}),
        ('```json\n{"name": "get_weather", "arguments": {"city": "a\nb"}}\n```', {"city": "a\nb"}),
        ('[{"name": "get_weather", "arguments": {"city": "C:\\dir"}}]', {"city": "C:\\dir"}),
        ('{"name": "get_weather"}', {}),
    ],
)
@pytest.mark.parametrize("family", ["json_tools", None, "qwen3_coder", "gemma4"])
def test_json_calls_are_repaired_where_it_is_unambiguous(written, arguments, family):
    wrapped = wrapper(family)
    start = wrapped.tool_call_start or "<tool_call>"
    events = decoded(f"{start}{written}", wrapped)
    assert [(name, json.loads(each)) for name, each in calls(events)] == [("get_weather", arguments)]
    assert texts(events) == ""


@pytest.mark.parametrize(
    "block",
    [
        "<tool_call>nothing of the kind</tool_call>",
        '<tool_call>{"na</tool_call>',
        '<tool_call>{"a": 1}</tool_call>',
    ],
)
@pytest.mark.parametrize("family", ["json_tools", "qwen3_coder", "glm47", None])
def test_a_block_that_is_no_call_is_shown_with_its_markers(block, family):
    events = decoded(f"See:\n{block} ok", wrapper(family))
    assert texts(events) == f"See:\n{block} ok"
    assert calls(events) == []


def test_an_unknown_tool_is_still_a_call():
    events = decoded('<tool_call>{"name": "rm", "arguments": {"f": 1}}</tool_call>', wrapper("json_tools"))
    assert calls(events) == [("rm", '{"f": 1}')]


def test_the_name_is_told_before_the_arguments():
    events = decoded('<tool_call>{"name": "get_weather", ', wrapper("json_tools"), reason="length")
    assert [type(event) for event in events] == [ToolCallStart]


@pytest.mark.parametrize("lead", ["", "\n", "<think>x</think>\n\n"])
@pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "[{}]"])
def test_an_answer_that_is_only_a_call_needs_no_markers(lead, frame):
    events = decoded(lead + frame.format(JSON_CALLS[0]), wrapper("qwen3_coder", thinks=True))
    assert [name for name, _ in calls(events)] == ["get_weather"]
    assert texts(events) == ""


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Alice", "age": 3}',
        '{"name": "get_weather"}',
        "```python\nx\n```",
        "[1] one",
        '{"city": 1}',
        "{",
    ],
)
def test_other_json_stays_text(answer):
    events = decoded(answer, wrapper("json_tools"))
    assert texts(events) == answer
    assert calls(events) == []


def test_a_bare_call_is_text_where_json_was_asked_for_or_calls_were_not():
    wrapped = wrapper("json_tools")
    asked = Generation(tools=TOOLS, constraint=Constraint(kind="json_object"))
    for request in (asked, Generation(), Generation(tools=TOOLS, tool_choice=ToolChoice(mode="none"))):
        assert texts(decoded(JSON_CALLS[0], wrapped, request)) == JSON_CALLS[0]


def test_without_tools_markers_are_text():
    answer = ANSWERS["json_tools"]
    assert texts(decoded(answer, wrapper("json_tools"), Generation())) == answer


def test_a_call_inside_reasoning_is_a_call():
    answer = f"<think>Hm.\n<tool_call>{JSON_CALLS[0]}</tool_call></think>\nDone."
    events = decoded(answer, wrapper("json_tools", thinks=True))
    assert [name for name, _ in calls(events)] == ["get_weather"]
    assert reasoning(events) == "Hm.\n"
    assert texts(events) == "Done."


def test_text_after_a_started_call_is_not_lost():
    answer = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}} and so on</tool_call>'
    events = decoded(answer, wrapper("json_tools"))
    assert calls(events) == [("get_weather", '{"city": "Bern"}')]
    assert "and so on" in texts(events)
