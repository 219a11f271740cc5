"""Tool calls that are written as tags, one per argument: strings as they are, everything else as JSON.

Where an argument may be a string or something else, its text is free: a reader cannot tell them apart.
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from mlx_optiq_ext.engine.grammars.lark import Grammar, one_of, quoted
from mlx_optiq_ext.engine.grammars.schema import (
    Parameter,
    arguments_schema,
    kinds,
    parameters,
    resolved,
    string_terminal,
    string_words,
)
from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["GLM", "KIMI_K3", "LONGCAT", "MINICPM5", "MINIMAX_M2", "MUSE_SPARK", "QWEN3_CODER", "TagSyntax"]

_NOT_NULL = r" & ~/\s*(?i:null)\s*/"
_NOT_JSON = r"/[^\s\-0-9\"\[{](?s:.*)/ & ~/(true|false|null|NaN|Infinity)\s*/"


class TagSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """How a family writes calls; ``NAME`` is the tool or the argument, ``TYPE`` the argument's JSON type.

    ``~`` in a tag stands for a line break that may be there.
    """

    section: tuple[str, str] | None = None
    """Around all calls of an answer, where they share one."""
    call: tuple[str, str]
    """Around each call."""
    argument: tuple[str, str]
    """Around each value."""
    strings: Literal["plain", "null_is_null", "cdata", "unless_json"] = "plain"
    """What a string is: any text; any but ``null``; any in CDATA; JSON unless it cannot be taken for such."""
    empty: str = ""
    """A whole call without arguments, where it is written differently."""
    escapes: tuple[tuple[str, str], ...] = ()
    """Of names."""

    def __call__(self, grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
        """Lark expression of one or more calls."""
        call = grammar.rule(one_of([each for tool in tools for each in self._calls(grammar, tool)]))
        calls = f"{call} ({_tag(grammar, '~')} {call})*" if parallel else call
        # After a line break that was to end the turn, the only way must not be another call.
        calls = f"{calls} {_tag(grammar, '~')}" if parallel and self.section is None else calls
        if self.section is None:
            return calls
        begin, end = (_tag(grammar, tag) for tag in self.section)
        return f"{begin} {calls} {end}"

    def _calls(self, grammar: Grammar, tool: ToolSpec) -> list[str]:
        begin, end = (_tag(grammar, self._named(tag, tool.name)) for tag in self.call)
        found = parameters(tool.parameters)
        if found is None:
            free = grammar.rule(self._free(grammar))
            return [f"{begin} ({free})* {end}"]
        written = [grammar.rule(self._argument(grammar, each, tool)) for each in found]
        body = " ".join(
            name if each.is_required else f"({name})?" for name, each in zip(written, found, strict=True)
        )
        if not self.empty or any(each.is_required for each in found):
            return [f"{begin} {body} {end}"]
        empty = _tag(grammar, self._named(self.empty, tool.name))
        # Nothing here requires an argument, so the form of none is chosen by the first one that is there.
        later = [
            f"{begin} {' '.join([name, *(f'({other})?' for other in written[n + 1 :])])} {end}"
            for n, name in enumerate(written)
        ]
        return [empty, *later]

    def _named(self, tag: str, name: str) -> str:
        for letter, escape in self.escapes:
            name = name.replace(letter, escape)
        return tag.replace("NAME", name)

    def _free(self, grammar: Grammar) -> str:
        """An argument of any name and value, for a schema that does not list them."""
        begin, end = self.argument
        head, _, tail = begin.partition("NAME")
        name = grammar.rule(r"/[A-Za-z_][\w.-]{0,63}/")
        value = grammar.text_until(_firm(end))
        return f"{_tag(grammar, head)} {name} {_tag(grammar, tail.replace('TYPE', 'string'))} {value}"

    def _argument(self, grammar: Grammar, parameter: Parameter, tool: ToolSpec) -> str:
        begin, end = self.argument
        allowed = kinds(parameter.schema, arguments_schema(tool.parameters))
        is_text = "string" in allowed
        kind = "string" if is_text else min(allowed, default="null")
        head = _tag(grammar, self._named(begin, parameter.name).replace("TYPE", kind))
        if not is_text:
            return f"{head} {grammar.json(parameter.schema, lenient=True)} {_tag(grammar, end)}"
        schema = resolved(parameter.schema, parameter.schema) if allowed == {"string"} else {}
        return f"{head} {self._string(grammar, schema, end)}"

    def _string(self, grammar: Grammar, schema: Any, end: str) -> str:
        words = string_words(schema)
        if words is not None:
            return f"({' | '.join(quoted(word) for word in words)}) {_tag(grammar, end)}"
        text = string_terminal(schema)
        if self.strings == "cdata":
            inner = grammar.text_until("]]>", text)
            plain = grammar.terminal(f"{text} & /[^<&\\n]*/{_NOT_NULL}")
            return f'("<![CDATA[" {inner} | {plain}) {_tag(grammar, end)}'
        if self.strings == "unless_json":
            as_json = f"{grammar.json(schema, lenient=True)} {_tag(grammar, end)}"
            return f"({grammar.text_until(_firm(end), f'{text} & {_NOT_JSON}')} | {as_json})"
        limit = _NOT_NULL if self.strings == "null_is_null" else ""
        return grammar.text_until(_firm(end), text + limit)


def _tag(grammar: Grammar, tag: str) -> str:
    """A tag as an expression, with its line breaks that may be there."""
    return ' "\\n"? '.join(grammar.literal(part) if part else "" for part in tag.split("~")).strip() or '""'


def _firm(tag: str) -> str:
    """A closing tag up to where it may vary; a line break before it is always written."""
    return tag.rstrip("~").replace("~", "\n")


QWEN3_CODER = TagSyntax(
    call=("<tool_call>~<function=NAME>\n", "</function>~</tool_call>"),
    argument=("<parameter=NAME>\n", "\n</parameter>\n"),
    strings="null_is_null",
)
GLM = TagSyntax(
    call=("<tool_call>NAME~", "</tool_call>"),
    argument=("<arg_key>NAME</arg_key>~<arg_value>", "</arg_value>~"),
)
LONGCAT = TagSyntax(
    call=("<longcat_tool_call>NAME~", "</longcat_tool_call>"),
    argument=("<longcat_arg_key>NAME</longcat_arg_key>~<longcat_arg_value>", "</longcat_arg_value>~"),
    empty='<longcat_tool_call>~{"name": "NAME", "arguments": {}}~</longcat_tool_call>',
)
MINIMAX_M2 = TagSyntax(
    section=("<minimax:tool_call>~", "~</minimax:tool_call>"),
    call=('<invoke name="NAME">~', "</invoke>"),
    argument=('<parameter name="NAME">', "</parameter>~"),
    strings="null_is_null",
)
MINICPM5 = TagSyntax(
    call=('<function name="NAME">~', "</function>"),
    argument=('<param name="NAME">', "</param>~"),
    strings="cdata",
)
MUSE_SPARK = TagSyntax(
    section=("<atem:function_calls>~", "~</atem:function_calls>"),
    call=('<atem:invoke name="NAME">~', "</atem:invoke>"),
    argument=('<atem:parameter name="NAME">', "</atem:parameter>~"),
    strings="unless_json",
)
KIMI_K3 = TagSyntax(
    section=("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),
    call=('<|open|>call tool="NAME" index="1"<|sep|>', "<|close|>call<|sep|>"),
    argument=('<|open|>argument key="NAME" type="TYPE"<|sep|>', "<|close|>argument<|sep|>"),
    escapes=(("&", "&amp;"), ('"', "&quot;")),
)
