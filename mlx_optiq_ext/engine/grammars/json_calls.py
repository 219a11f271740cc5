"""Tool calls whose arguments are one JSON object."""

import json
from collections.abc import Sequence

from mlx_optiq_ext.engine.grammars.lark import Grammar, one_of
from mlx_optiq_ext.engine.grammars.schema import arguments_schema
from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["hermes", "kimi_k2", "mistral_headers", "mistral_list"]

_SPACE = r"/[ \n]{0,4}/"


def hermes(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``<tool_call>{"name": …, "arguments": …}</tool_call>``, once per call."""
    begin, end = grammar.literal("<tool_call>"), grammar.literal("</tool_call>")
    space = grammar.rule(_SPACE)
    call = grammar.rule(f"{begin} {space} {_objects(grammar, tools)} {space} {end}")
    return f"{call} ({space} {call})* {space}" if parallel else call


def mistral_list(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``[TOOL_CALLS][{"name": …, "arguments": …}, …]``."""
    call = grammar.rule(_objects(grammar, tools))
    more = f'("," " "? {call})*' if parallel else ""
    return f'{grammar.literal("[TOOL_CALLS]")} " "? "[" {call} {more} "]"'


def mistral_headers(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """``[TOOL_CALLS]name[ARGS]{…}``, once per call."""
    begin = grammar.literal("[TOOL_CALLS]")
    calls = [f"{begin} {grammar.literal(f'{tool.name}[ARGS]')} {_arguments(grammar, tool)}" for tool in tools]
    call = grammar.rule(one_of(calls))
    return f"{call} ({call})*" if parallel else call


def kimi_k2(grammar: Grammar, tools: Sequence[ToolSpec], *, parallel: bool) -> str:
    """Section of ``<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>``."""
    number = grammar.rule("/[0-9]{1,4}/")
    calls = [
        f"{grammar.literal(f'<|tool_call_begin|>functions.{tool.name}:')} {number} "
        f"{grammar.literal('<|tool_call_argument_begin|>')} {_arguments(grammar, tool)} "
        f"{grammar.literal('<|tool_call_end|>')}"
        for tool in tools
    ]
    call = grammar.rule(one_of(calls))
    section = f"{call} ({call})*" if parallel else call
    begin = grammar.literal("<|tool_calls_section_begin|>")
    return f"{begin} {section} {grammar.literal('<|tool_calls_section_end|>')}"


def _objects(grammar: Grammar, tools: Sequence[ToolSpec]) -> str:
    heads = [grammar.literal(f'{{"name": {json.dumps(tool.name)}, "arguments": ') for tool in tools]
    bodies = [_arguments(grammar, tool) for tool in tools]
    return one_of([f'{head} {body} "}}"' for head, body in zip(heads, bodies, strict=True)])


def _arguments(grammar: Grammar, tool: ToolSpec) -> str:
    return grammar.json(arguments_schema(tool.parameters), lenient=True)
