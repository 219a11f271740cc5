"""Tool calls that are written as calls of a programming language, with its literals."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from mlx_optiq_ext.engine.grammars.lark import Grammar, one_of
from mlx_optiq_ext.engine.grammars.schema import (
    ALL_KINDS,
    Parameter,
    kinds,
    parameters,
    resolved,
    string_terminal,
    string_words,
)
from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["function_gemma", "gemma4", "pythonic"]

_PYTHON_ESCAPES = 'nrtbf"\\'
"""Escapes that mean the same in JSON and in Python."""
_NAME = r"/[A-Za-z_]\w{0,63}/"
_SCALARS = ("boolean", "integer", "null", "number")
_Write = Callable[[Any], str]


def pythonic(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``<|tool_call_start|>[name(key=value, …), …]<|tool_call_end|>``; values are JSON that Python reads."""

    def value(schema: Any) -> str:
        return grammar.json(schema, lenient=True, json_allowed_escapes=_PYTHON_ESCAPES)

    calls = [
        f'{grammar.literal(tool.name)} "(" {_named(grammar, tool, "=", ", ", value)} ")"' for tool in tools
    ]
    call = grammar.rule(one_of(calls))
    more = f'("," " "? {call})*' if parallel else ""
    begin, end = grammar.literal("<|tool_call_start|>"), grammar.literal("<|tool_call_end|>")
    return f'{begin} "[" {call} {more} "]" {end}'


def function_gemma(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``<start_function_call>call:name{key:<escape>text<escape>,…}<end_function_call>``.

    Its readers end a call at the first ``}``, so texts go without; arrays and objects are JSON, which they
    read only where that has no comma and no brace.
    """
    quote = "<escape>"

    def value(schema: Any) -> str:
        allowed = kinds(schema, schema)
        if "string" not in allowed:
            return grammar.json(schema, lenient=True)
        text = _text(grammar, schema if allowed == {"string"} else {}, quote, r" & /[^}]*/")
        rest = allowed & set(_SCALARS)
        return one_of([text, grammar.json({"type": sorted(rest)})] if rest else [text])

    return _gemma_calls(grammar, tools, parallel, ("<start_function_call>", "<end_function_call>"), value)


def gemma4(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``<|tool_call>call:name{key:<|"|>text<|"|>,list:[…],object:{key:…}}<tool_call|>``."""
    return _gemma_calls(
        grammar,
        tools,
        parallel,
        ("<|tool_call>", "<tool_call|>"),
        lambda schema: _Gemma4(grammar, schema).value,
    )


def _gemma_calls(
    grammar: Grammar, tools: Sequence[ToolSpec], parallel: bool, ends: tuple[str, str], value: _Write
) -> str:
    begin, end = (grammar.literal(each) for each in ends)
    calls = []
    for tool in tools:
        pairs = _named(grammar, tool, ":", ",", value)
        calls.append(f'{begin} {grammar.literal(f"call:{tool.name}")} "{{" {pairs} "}}" {end}')
    call = grammar.rule(one_of(calls))
    return f"{call} ({call})*" if parallel else call


def _named(grammar: Grammar, tool: ToolSpec, between: str, comma: str, value: _Write) -> str:
    """All arguments of a tool as ``key value`` pairs."""
    found = parameters(tool.parameters)
    separator = json.dumps(comma)
    if found is None:
        pair = grammar.rule(f"{grammar.rule(_NAME)} {json.dumps(between)} {value({})}")
        return f"({pair} ({separator} {pair})*)?"
    return _listed(grammar, found, between, separator, value)


def _listed(grammar: Grammar, found: list[Parameter], between: str, separator: str, value: _Write) -> str:
    """Pairs in order, optional ones left out or not, with separators only between them.

    From the back: ``first`` is what may stand there if no pair came before, ``more`` what follows a pair.
    """
    first, more = '""', '""'
    for each in reversed(found):
        pair = grammar.rule(f"{grammar.literal(each.name)} {json.dumps(between)} {value(each.schema)}")
        taken = f"{pair} {more}"
        first = taken if each.is_required else grammar.rule(f"{taken} | {first}")
        more = f"{separator} {taken}" if each.is_required else f"({separator} {pair})? {more}"
        more = grammar.rule(more)
    return first


def _text(grammar: Grammar, schema: Any, quote: str, limit: str = "") -> str:
    """A string between two quotes."""
    words = string_words(schema)
    mark = grammar.literal(quote)
    if words is not None:
        return f"{mark} ({' | '.join(json.dumps(word, ensure_ascii=False) for word in words)}) {mark}"
    return f"{mark} {grammar.text_until(quote, string_terminal(schema) + limit)}"


class _Gemma4:
    """Rules of values in Gemma 4's notation: JSON with bare keys and its own quotes."""

    _QUOTE = '<|"|>'

    def __init__(self, grammar: Grammar, root: Any) -> None:
        self._grammar = grammar
        self._root = root
        self._references: dict[str, str] = {}
        self._anything = ""
        self.value = self._value(root)

    def _value(self, schema: Any) -> str:
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if reference in self._references:
            return self._references[reference]
        if not isinstance(schema, dict) or not schema or set(schema) <= {"description", "title", "default"}:
            return self._any()
        name = self._grammar.reserve()
        if reference is not None:
            self._references[reference] = name
        self._grammar.define(name, self._body(resolved(schema, self._root)))
        return name

    def _body(self, schema: dict[str, Any]) -> str:
        if "enum" in schema or "const" in schema:
            return one_of([self._constant(value) for value in schema.get("enum", [schema.get("const")])])
        for word in ("anyOf", "oneOf"):
            if schema.get(word):
                return one_of([self._value(each) for each in schema[word]])
        allowed = kinds(schema, self._root)
        options = []
        if "string" in allowed:
            options.append(_text(self._grammar, schema, self._QUOTE))
        scalars = sorted(allowed & set(_SCALARS) - ({"integer"} if "number" in allowed else set()))
        if scalars:
            options.append(self._grammar.json({**schema, "type": scalars}, lenient=True))
        if "array" in allowed:
            options.append(self._array(schema))
        if "object" in allowed:
            options.append(self._object(schema))
        return one_of(options)

    def _array(self, schema: dict[str, Any]) -> str:
        item = self._value(schema.get("items", {}))
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[]"'
        later = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){later}'
        return f'"[" {items if least else f"({items})?"} "]"'

    def _object(self, schema: dict[str, Any]) -> str:
        properties = schema.get("properties")
        if not properties:
            pair = self._grammar.rule(f'{self._grammar.rule(_NAME)} ":" {self._any()}')
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        required = set(schema.get("required") or ())
        found = [
            Parameter(name=name, schema=each, is_required=name in required)
            for name, each in properties.items()
        ]
        return f'"{{" {_listed(self._grammar, found, ":", json.dumps(","), self._value)} "}}"'

    def _any(self) -> str:
        """A value of any kind."""
        if not self._anything:
            self._anything = self._grammar.reserve()
            body = self._body({"type": sorted(ALL_KINDS)})
            self._grammar.define(self._anything, body)
        return self._anything

    def _constant(self, value: Any) -> str:
        quote = self._grammar.literal(self._QUOTE)
        if isinstance(value, str):
            return f"{quote} {json.dumps(value, ensure_ascii=False)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, list):
            inner = ' "," '.join(self._constant(each) for each in value)
            return f'"[" {inner} "]"'
        if isinstance(value, dict):
            pairs = [
                f'{self._grammar.literal(name)} ":" {self._constant(each)}' for name, each in value.items()
            ]
            joined = ' "," '.join(pairs)
            return f'"{{" {joined} "}}"'
        return f'"{json.dumps(value)}"'
