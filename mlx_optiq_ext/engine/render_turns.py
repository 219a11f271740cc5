"""From messages to the turns that chat templates take, in a form that this one accepts.

Knows what templates refuse, not how they write. ``render_form`` finds out the form, ``prompt`` renders.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from mlx_optiq_ext.engine.render_tokens import ControlTokens
from mlx_optiq_ext.engine.tools.block import CallSyntax
from mlx_optiq_ext.engine.tools.lenient_json import dump
from mlx_optiq_ext.types.chat import Image, Message, Part, Reasoning, Text, ToolCall, ToolResult

__all__ = ["LAST_RESORT", "Form", "Turn", "TurnWriter", "hoist_system", "tools_as_text"]

Turn: TypeAlias = dict[str, Any]


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """What a template takes; the defaults are the most that one can take."""

    system: Literal["anywhere", "first", "never"] = "anywhere"
    neighbours: bool = True
    """Two turns of one role in a row."""
    tools: bool = True
    """Definitions, calls and results."""
    arguments: Literal["object", "text"] = "object"
    ids: Literal["counted", "named"] = "counted"
    """Whether the identifier of a call is all that tells its name."""
    parallel: bool = True
    """Several calls in a turn."""
    user_after_result: bool = True


LAST_RESORT = Form(system="never", neighbours=False, tools=False)
"""Users and assistants in turn, text only: what every template takes."""


def hoist_system(messages: Sequence[Message]) -> list[Message]:
    """One system message at the head, of all that stand there or right after the first user's turn.

    What a client tells there is the same in all its sessions; behind the user's words no other session could
    share it.
    """
    first_user = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    end = first_user + 1
    while end < len(messages) and messages[end].role == "system" and messages[first_user].role == "user":
        end += 1
    head = [*messages[:first_user], *messages[first_user + 1 : end]]
    texts = [text for message in head if (text := _text(message.parts))]
    system = [Message(role="system", parts=(Text(text="\n\n".join(texts)),))] if texts else []
    return [*system, *messages[first_user : first_user + 1], *messages[end:]]


def tools_as_text(definitions: Sequence[dict[str, Any]], syntax: CallSyntax) -> str:
    """What a system message says of tools where the template says nothing."""
    listed = "\n".join(dump(each["function"]) for each in definitions)
    call = f'{syntax.start}{{"name": "tool name", "arguments": {{"argument": "value"}}}}{syntax.end}'
    return (
        "You can use tools. To use one, write a line of this form and nothing after it:\n"
        f"{call}\n"
        "Its result comes in the next message. Write several such lines to use several tools. "
        "Answer in words where no tool is needed. The tools and the JSON schemas of their arguments:\n"
        f"{listed}"
    )


class TurnWriter:
    """Writes turns.

    Args:
        form: What the template takes.
        control: Marks what clients sent.
        syntax: How the model writes calls, for text that stands for them.
    """

    def __init__(self, form: Form, control: ControlTokens, syntax: CallSyntax) -> None:
        self._form = form
        self._mark = control.mark
        self._syntax = syntax

    def write(self, messages: Sequence[Message], tools_text: str = "") -> list[Turn]:
        """The turns of a conversation.

        Args:
            messages: With at most one system message at the head.
            tools_text: What the system message has to say of tools.
        """
        turns = self._turns(messages)
        if tools_text:
            turns.insert(0, {"role": "system", "content": tools_text})
        turns = self._with_system(turns)
        if not self._form.tools:
            turns = [self._without_tools(turn) for turn in turns]
        elif not self._form.parallel:
            turns = _one_call_a_turn(turns)
        if not self._form.user_after_result:
            turns = _apart(turns)
        if not self._form.neighbours:
            turns = _joined(turns)
            head = turns[0]["role"] == "system" if turns else False
            if turns[head:] and turns[head]["role"] == "assistant":
                turns.insert(int(head), {"role": "user", "content": "(The conversation goes on.)"})
        return turns

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        turns: list[Turn] = []
        calls: dict[str, tuple[str, str]] = {}
        for message in messages:
            if message.role == "tool":
                turns += [self._result(part, calls) for part in message.parts if isinstance(part, ToolResult)]
            elif message.role == "assistant":
                turns.append(self._assistant(message, calls))
            else:
                turns.append({"role": message.role, "content": self._content(message.parts)})
        return turns

    def _assistant(self, message: Message, calls: dict[str, tuple[str, str]]) -> Turn:
        turn: Turn = {"role": "assistant", "content": self._content(message.parts, by_model=True)}
        if thought := "\n".join(part.text for part in message.parts if isinstance(part, Reasoning)):
            turn["reasoning_content"] = self._mark(thought)
        written = [self._call(part, calls) for part in message.parts if isinstance(part, ToolCall)]
        return turn | ({"tool_calls": written} if written else {})

    def _call(self, call: ToolCall, calls: dict[str, tuple[str, str]]) -> Turn:
        # Clients change identifiers from turn to turn; counted ones keep the prompt the same.
        number = len({made for made, _ in calls.values()})
        made = f"functions.{call.name}:{number}" if self._form.ids == "named" else f"call{number:05d}"
        calls[call.id] = calls[made] = (made, call.name)
        arguments = self._mark(call.arguments)
        function = {
            "name": self._mark(call.name),
            "arguments": arguments if self._form.arguments == "object" else dump(arguments),
        }
        return {"type": "function", "id": made, "function": function}

    def _result(self, result: ToolResult, calls: dict[str, tuple[str, str]]) -> Turn:
        made, name = calls.get(result.id, ("call00000", ""))
        text = self._mark(_join(_shown(part) for part in result.parts))
        if result.is_error and "error" not in text[:40].lower():
            text = f"Error: {text}"
        return {"role": "tool", "content": text, "name": result.name or name, "tool_call_id": made}

    def _content(self, parts: Iterable[Part], *, by_model: bool = False) -> Any:
        parts = list(parts)
        if not any(isinstance(part, Image) for part in parts):
            return self._mark(_text(parts), by_model=by_model)
        return [
            {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": self._mark(part.text)}
            for part in parts
            if isinstance(part, Text | Image)
        ]

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        """System turns where the template takes them, and as words to the user where it does not."""
        head: list[Turn] = []
        while turns and turns[0]["role"] == "system":
            head.append(turns[0])
            turns = turns[1:]
        if self._form.system != "anywhere":
            turns = [_reminder(turn) if turn["role"] == "system" else turn for turn in turns]
        if not head:
            return turns
        system = {"role": "system", "content": "\n\n".join(turn["content"] for turn in head)}
        if self._form.system != "never":
            return [system, *turns]
        return _joined([{**system, "role": "user"}, *turns[:1]]) + turns[1:]

    def _without_tools(self, turn: Turn) -> Turn:
        if turn["role"] == "tool":
            name = f' name="{turn["name"]}"' if turn["name"] else ""
            return {
                "role": "user",
                "content": f"<tool_response{name}>\n{turn['content']}\n</tool_response>",
            }
        calls = [each["function"] for each in turn.get("tool_calls", ())]
        if not calls:
            return turn
        arguments = [
            each["arguments"] if isinstance(each["arguments"], str) else dump(each["arguments"])
            for each in calls
        ]
        written = [
            f'{self._syntax.start}{{"name": {dump(each["name"])}, "arguments": {text}}}{self._syntax.end}'
            for each, text in zip(calls, arguments, strict=True)
        ]
        rest = {key: value for key, value in turn.items() if key != "tool_calls"}
        return {**rest, "content": "\n".join(filter(None, (turn["content"], *written)))}


def _text(parts: Iterable[Part]) -> str:
    return _join(part.text for part in parts if isinstance(part, Text))


def _join(texts: Iterable[str]) -> str:
    """Texts one after another, each on a line of its own."""
    joined = ""
    for text in texts:
        joined += "\n" + text if joined and text and not joined.endswith("\n") else text
    return joined


def _shown(part: Text | Image) -> str:
    if isinstance(part, Text):
        return part.text
    return f"[image {part.media_type}, {len(part.data)} bytes: this model cannot see images]"


def _reminder(turn: Turn) -> Turn:
    return {"role": "user", "content": f"<system-note>\n{turn['content']}\n</system-note>"}


def _one_call_a_turn(turns: Sequence[Turn]) -> list[Turn]:
    """Every call right before its result."""
    results = {turn["tool_call_id"]: turn for turn in turns if turn["role"] == "tool"}
    written: list[Turn] = []
    moved: set[str] = set()
    for turn in turns:
        calls = turn.get("tool_calls", ())
        if len(calls) < 2:
            if turn["role"] != "tool" or turn["tool_call_id"] not in moved:
                written.append(turn)
            continue
        for at, call in enumerate(calls):
            written.append({**turn, "content": "" if at else turn["content"], "tool_calls": [call]})
            if call["id"] in results:
                written.append(results[call["id"]])
                moved.add(call["id"])
    return written


def _apart(turns: Sequence[Turn]) -> list[Turn]:
    """A word of the assistant between a tool's result and the user."""
    written: list[Turn] = []
    for turn in turns:
        if written and written[-1]["role"] == "tool" and turn["role"] == "user":
            written.append({"role": "assistant", "content": "Noted."})
        written.append(turn)
    return written


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role in one turn, other than results of tools."""
    joined: list[Turn] = []
    for turn in turns:
        if not joined or joined[-1]["role"] != turn["role"] or turn["role"] == "tool":
            joined.append(turn)
            continue
        last = joined[-1]
        both = {**last, **turn, "content": _contents(last["content"], turn["content"])}
        for key in ("tool_calls", "reasoning_content"):
            if key in last and key in turn:
                both[key] = last[key] + turn[key]
        joined[-1] = both
    return joined


def _contents(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, (first, second)))
    return [
        part
        for each in (first, second)
        for part in ([{"type": "text", "text": each}] if isinstance(each, str) else each)
    ]
