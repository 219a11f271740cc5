"""Calls drawn at random within a family's grammar, read by mlx-lm's own parser of that family."""

from typing import Any

import numpy as np
import pytest
from support_grammars import (
    FAMILIES,
    VOCAB,
    calls_in,
    draw,
    family_tokenizer,
    matcher_of,
)

from mlx_optiq_ext.engine.grammars.answer import AnswerForm, without
from mlx_optiq_ext.engine.vocabulary import grammar_tokenizer, llguidance
from mlx_optiq_ext.types.chat import Constraint, ToolSpec

_WEATHER = ToolSpec(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "wet": {"type": "boolean"},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
)
_NOTHING = ToolSpec(name="noop", parameters={"type": "object", "properties": {}})
_OPTIONAL = ToolSpec(
    name="mark",
    parameters={
        "type": "object",
        "properties": {
            "weight": {"type": "number", "minimum": 0, "maximum": 9},
            "code": {"type": "string", "maxLength": 5, "pattern": "^[a-c]+$"},
        },
    },
)
_NESTED = ToolSpec(
    name="deep",
    parameters={
        "type": "object",
        "properties": {
            "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "minItems": 1, "maxItems": 3},
            "box": {
                "type": "object",
                "properties": {"wide": {"type": "integer"}, "name": {"type": "string"}},
                "required": ["wide"],
                "additionalProperties": False,
            },
        },
        "required": ["points"],
        "$defs": {
            "Point": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "label": {"type": "string"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
)


def _is_weather(arguments: dict[str, Any]) -> bool:
    return (
        {"city", "days"} <= set(arguments) <= {"city", "unit", "days", "wet"}
        and isinstance(arguments["city"], str)
        and arguments.get("unit", "C") in ("C", "F")
        and type(arguments["days"]) is int
        and 0 <= arguments["days"] <= 99
        and isinstance(arguments.get("wet", True), bool)
    )


def _is_mark(arguments: dict[str, Any]) -> bool:
    code = arguments.get("code", "a")
    return (
        set(arguments) <= {"weight", "code"}
        and 0 <= arguments.get("weight", 0) <= 9
        and 1 <= len(code) <= 5
        and set(code) <= set("abc")
    )


def _is_deep(arguments: dict[str, Any]) -> bool:
    points, box = arguments["points"], arguments.get("box", {"wide": 1})
    return (
        1 <= len(points) <= 3
        and all({"x"} <= set(each) <= {"x", "label"} and type(each["x"]) is int for each in points)
        and all(isinstance(each.get("label", ""), str) for each in points)
        and {"wide"} <= set(box) <= {"wide", "name"}
        and type(box["wide"]) is int
    )


_CHECKS = {
    "get_weather": _is_weather,
    "noop": lambda arguments: arguments == {},
    "mark": _is_mark,
    "deep": _is_deep,
}


@pytest.mark.parametrize("spelled", [False, True], ids=["tokens", "spelled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_calls_are_read_by_the_family_s_parser_and_fit_their_schemas(
    family: str, spelled: bool
) -> None:
    tokenizer = family_tokenizer(family, markers=[] if spelled else None)
    # function_gemma's parser reads no arrays and objects.
    tools = (_WEATHER, _NOTHING, _OPTIONAL) + ((_NESTED,) if family != "function_gemma" else ())
    syntaxes = ["mistral", "mistral_headers"] if family == "mistral" else [family]
    names, counts = set(), []
    for seed in range(24):
        form = AnswerForm(tools=tools, parallel=seed % 2 == 0)
        matcher = matcher_of(tokenizer, form, syntaxes[seed % len(syntaxes)])
        tokens = draw(matcher, np.random.default_rng(seed), tokenizer.eos_token_ids)
        if tokens is None:
            continue
        calls = calls_in(tokenizer, tokenizer.decode(tokens), tools)
        assert form.parallel or len(calls) == 1
        for call in calls:
            assert _CHECKS[call["name"]](call["arguments"]), call
        names |= {call["name"] for call in calls}
        counts.append(len(calls))
    assert len(counts) >= 8
    # A random model seldom spells the end of a text.
    assert len(names) >= (1 if spelled else 3)
    assert spelled or max(counts) > 1


def _allows(
    form: AnswerForm, text: str, family: str = "json_tools", markers: list[str] | None = None
) -> bool:
    tokenizer = family_tokenizer(None, markers=markers or [])
    matcher = matcher_of(tokenizer, form, family)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint(kind="json_object"), ['{"a": [1, null]}', "\n{}"], ["[1]", "{", '{"a": 1} x']),
        (Constraint(kind="json_schema", value=True), ["3", '"x"', "[{}]"], ["x", ""]),
        (
            Constraint(kind="json_schema", value={"type": "array", "items": {"const": "a"}}),
            ['["a", "a"]', "[]"],
            ['["b"]', "{}"],
        ),
        (Constraint(kind="regex", value=r"^[a-c]+/\d{2}$"), ["abc/12"], ["abc/1", "x", "abc/123"]),
        (Constraint(kind="regex", value="yes|no"), ["yes", "no"], ["yesno", "maybe"]),
        (Constraint(kind="lark", value='start: "a" b*\nb: "b" | "c"'), ["a", "abcb"], ["b", "aa"]),
    ],
)
def test_a_constraint_allows_what_it_says(constraint: Constraint, good: list[str], bad: list[str]) -> None:
    form = AnswerForm(constraint=constraint)
    assert [text for text in good if not _allows(form, text)] == []
    assert [text for text in bad if _allows(form, text)] == []


def test_with_a_constraint_and_tools_the_answer_is_either() -> None:
    form = AnswerForm(constraint=Constraint(kind="regex", value="yes|no"), tools=(_NOTHING,))
    assert _allows(form, "yes")
    assert _allows(form, '<tool_call>\n{"name": "noop", "arguments": {}}\n</tool_call>')
    assert not _allows(form, 'yes<tool_call>{"name": "noop", "arguments": {}}</tool_call>')
    assert not _allows(form, '<tool_call>{"name": "other", "arguments": {}}</tool_call>')


def test_integers_come_to_an_end() -> None:
    properties = {
        "n": {"type": "integer"},
        "maybe": {"type": ["integer", "null"]},
        "of": {"const": {"type": "integer"}},
    }
    form = AnswerForm(constraint=Constraint(kind="json_schema", value={"properties": properties}))
    assert _allows(form, '{"n": 8999999999999999999, "maybe": -12, "of": {"type": "integer"}}')
    assert _allows(form, '{"maybe": null}')
    assert not _allows(form, '{"n": 11111111111111111111}')
    assert not _allows(form, '{"maybe": 11111111111111111111}')


def test_free_text_without_a_marker_may_hold_other_markers() -> None:
    tokenizer = family_tokenizer(None, markers=["<x>", "<y>", "<z>"])
    x, y = tokenizer.convert_tokens_to_ids(["<x>", "<y>"])
    lexicon = grammar_tokenizer(tokenizer, VOCAB)

    def read(text: str) -> int:
        matcher = llguidance().LLMatcher(lexicon, without("<call", [x, y]), log_level=0)
        return int(matcher.try_consume_tokens(tokenizer.encode(text, add_special_tokens=False)))

    assert (read("a<x><y>b <cal"), read("<call"), read("a<z>")) == (9, 4, 1)


def test_json_is_never_spaced_out_for_ever() -> None:
    form = AnswerForm(constraint=Constraint(kind="json_object"))
    assert _allows(form, '{\n    "a":\n 1}')
    assert not _allows(form, '{"a":' + " " * 40 + "1}")


def test_markers_of_the_family_are_never_part_of_a_value() -> None:
    tokenizer = family_tokenizer("json_tools")
    matcher = matcher_of(
        tokenizer, AnswerForm(constraint=Constraint(kind="json_schema", value={"type": "string"}))
    )
    assert matcher.consume_token(tokenizer.encode('"')[0])
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    for marker in ("<tool_call>", "</tool_call>", "</think>", "</s>"):
        assert not bits[tokenizer.convert_tokens_to_ids(marker)], marker
    assert bits[tokenizer.encode("<")[0]]


def test_a_line_break_behind_a_call_asks_for_no_other_one() -> None:
    form = AnswerForm(tools=(_NOTHING,))
    assert _allows(form, '<tool_call>{"name": "noop", "arguments": {}}</tool_call>\n')
    assert _allows(form, "<tool_call>noop</tool_call>\n", "glm47")


def test_arguments_that_a_schema_does_not_list_are_free_in_name_and_value() -> None:
    form = AnswerForm(tools=(ToolSpec(name="any", parameters={"type": "object"}),))
    text = "<tool_call>any<arg_key>k</arg_key><arg_value>some\nthing</arg_value></tool_call>"
    assert _allows(form, text, "glm47")
    assert _allows(form, "<tool_call>any</tool_call>", "glm47")


def test_quotes_in_names_are_escaped_where_the_family_escapes_them() -> None:
    tool = ToolSpec(name="f", parameters={"properties": {'a"&': {"type": "null"}}, "required": ['a"&']})
    body = '<|open|>argument key="a&quot;&amp;" type="null"<|sep|>null<|close|>argument<|sep|>'
    call = f'<|open|>call tool="f" index="1"<|sep|>{body}<|close|>call<|sep|>'
    text = f"<|open|>tools<|sep|>{call}<|close|>tools<|sep|>"
    markers = ["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"]
    assert _allows(AnswerForm(tools=(tool,)), text, "kimi_k3")
    assert _allows(AnswerForm(tools=(tool,)), text, "kimi_k3", markers)
