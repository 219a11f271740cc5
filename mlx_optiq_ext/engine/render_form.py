"""Find out what a chat template takes, by handing it small conversations.

Knows no model's name: what a template shows of a conversation is what it takes. Used once per model by
``prompt``.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec.structs import replace

from mlx_optiq_ext.engine.render_tokens import ControlTokens
from mlx_optiq_ext.engine.render_turns import Form, Turn, TurnWriter
from mlx_optiq_ext.engine.tools.block import CallSyntax
from mlx_optiq_ext.engine.tools.parsed import definitions
from mlx_optiq_ext.measure.rendering import TEMPLATE_REFUSALS
from mlx_optiq_ext.types.chat import Message, Text, ToolCall, ToolResult, ToolSpec

__all__ = ["REFUSALS", "Apply", "find_form"]

Apply: TypeAlias = Callable[[list[Turn], list[dict[str, Any]] | None], str]

REFUSALS = (*TEMPLATE_REFUSALS, RecursionError)
"""What templates raise when they do not take a conversation."""

_TOOL = ToolSpec(
    name="probetool",
    description="Probedescription.",
    parameters={"type": "object", "properties": {"probekey": {"type": "string"}}},
)
_OTHER = ToolSpec(name="othertool", description="Otherdescription.")


def find_form(apply: Apply, control: ControlTokens, syntax: CallSyntax) -> Form:
    """The form of conversations that a template takes.

    Args:
        apply: Renders turns and definitions of tools; raises one of ``REFUSALS``.
        control: Marks what clients sent.
        syntax: How the model writes calls.
    """

    def takes(form: Form, messages: list[Message], words: list[str], *tools: ToolSpec) -> bool:
        turns = TurnWriter(form, control, syntax).write(messages)
        try:
            text = apply(turns, definitions(tools) or None)
        except REFUSALS:
            return False
        return _shows(text, words)

    form = Form()
    ask, answer, ask_again = _said("user", "Ask1"), _said("assistant", "Answer1"), _said("user", "Ask2")
    if not takes(form, [_said("system", "Rule1"), ask], ["Rule1", "Ask1"]):
        form = replace(form, system="never")
    elif not takes(
        form,
        [_said("system", "Rule1"), ask, answer, _said("system", "Rule2"), ask_again],
        ["Rule1", "Ask1", "Answer1", "Rule2", "Ask2"],
    ):
        form = replace(form, system="first")
    if not takes(form, [ask, ask_again, answer, answer, ask], ["Ask1", "Ask2", "Answer1"]):
        form = replace(form, neighbours=False)
    return _with_tools(form, takes, ask, ask_again)


def _with_tools(form: Form, takes: Callable[..., bool], ask: Message, ask_again: Message) -> Form:
    call = ToolCall(id="a", name="probetool", arguments={"probekey": "probevalue"})
    other = ToolCall(id="b", name="othertool", arguments={"otherkey": "othervalue"})
    called = [ask, _turn("assistant", call), _turn("tool", _result("a", "Result1"))]
    shown = ["Ask1", "probetool", "probekey", "probevalue", "Result1"]
    no_tools = replace(form, tools=False)
    if not takes(form, [ask], ["probetool", "Probedescription", "probekey"], _TOOL):
        return no_tools
    tries = [
        replace(form, arguments=arguments, ids=ids)
        for ids in ("counted", "named")
        for arguments in ("object", "text")
    ]
    tried = next((each for each in tries if takes(each, called, shown, _TOOL)), None)
    if tried is None:
        return no_tools
    both = [
        ask,
        _turn("assistant", call, other),
        _turn("tool", _result("a", "Result1"), _result("b", "Result2")),
    ]
    words = ["probevalue", "othertool", "othervalue", "Result2"]
    if not takes(tried, both, words, _TOOL, _OTHER):
        tried = replace(tried, parallel=False)
        if not takes(tried, both, words, _TOOL, _OTHER):
            return no_tools
    if not takes(tried, [*called, ask_again], ["Result1", "Ask2"], _TOOL):
        tried = replace(tried, user_after_result=False)
        if not takes(tried, [*called, ask_again], ["Result1", "Ask2"], _TOOL):
            return no_tools
    return tried


def _said(role: Any, text: str) -> Message:
    return Message(role=role, parts=(Text(text=text),))


def _turn(role: Any, *parts: Any) -> Message:
    return Message(role=role, parts=parts)


def _result(call: str, text: str) -> ToolResult:
    return ToolResult(id=call, parts=(Text(text=text),))


def _shows(text: str, words: list[str]) -> bool:
    """Whether the words stand in the text, one after another."""
    at = 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True
