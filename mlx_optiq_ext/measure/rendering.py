"""From a record to token ids: conversations through the model's own chat template, or visibly without it.

Templates differ in what they accept: some refuse a system message or drop tools without a word. Each form
below is tried in turn, and what came out is checked to hold what went in; the form used is returned with the
tokens, never swallowed. Knows nothing of files or windows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from jinja2 import TemplateError

from mlx_optiq_ext.measure.records import Record

__all__ = [
    "FORM_NOTES",
    "TEMPLATE_REFUSALS",
    "Form",
    "Message",
    "Rendered",
    "apply_template",
    "encode_text",
    "has_template",
    "holds_everything",
    "render_record",
    "with_parsed_arguments",
]

Form = Literal["text", "template", "tools_as_text", "system_in_user", "plain"]

FORM_NOTES: dict[Form, str] = {
    "tools_as_text": "the chat template does not take tools: tools, calls and results are text in its turns",
    "system_in_user": "the chat template takes no system message: put at the head of the first user turn",
    "plain": "no usable chat template: written as plain 'Role: content' paragraphs",
}
"""What to tell a reader about every form that is not the template's own."""

TEMPLATE_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What chat templates raise when they do not take a conversation."""
_WORD = re.compile(r"[A-Za-z0-9]{3,}")

_DATE_FIELDS = {"%Y": "2024", "%m": "07", "%d": "01", "%b": "Jul", "%B": "July", "%A": "Monday", "%y": "24"}
# The template's own name for the clock, defined anew at its head.
_DATE_MACRO = (
    "{%- macro strftime_now(pattern) -%}{{ pattern"
    + "".join(f" | replace('{field}', '{value}')" for field, value in _DATE_FIELDS.items())
    + " }}{%- endmacro -%}"
)

Message = dict[str, Any]


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of one record and the form they were written in."""

    tokens: list[int]
    form: Form


def render_record(tokenizer: Any, record: Record) -> Rendered:
    """Turn one record into token ids.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, a transformers tokenizer, or anything with
            ``encode(text, add_special_tokens=bool) -> list[int]``; ``apply_chat_template`` is optional.
        record: Text or conversation.
    Returns:
        Tokens and form. Text gets the special tokens that the tokenizer adds by itself (BOS); a template's
        output gets none, since templates write their own.
    """
    if record.text is not None:
        return Rendered(tokens=encode_text(tokenizer, record.text, add_special_tokens=True), form="text")
    messages = [with_parsed_arguments(message) for message in record.messages or ()]
    tools = list(record.tools or ()) or None
    if has_template(tokenizer):
        forms: list[tuple[Form, list[Message], list[dict[str, Any]] | None]] = [("template", messages, tools)]
        written = messages
        if tools or any(_is_tool_turn(message) for message in messages):
            written = _tools_as_text(messages, tools)
            forms.append(("tools_as_text", written, None))
        forms.append(("system_in_user", _merge_turns(written), None))
        for form, turns, offered in forms:
            text = apply_template(tokenizer, turns, offered)
            if text is not None and holds_everything(text, turns, offered):
                return Rendered(tokens=encode_text(tokenizer, text, add_special_tokens=False), form=form)
    plain = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in _tools_as_text(messages, tools))
    return Rendered(tokens=encode_text(tokenizer, plain, add_special_tokens=True), form="plain")


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a whole document; windows are cut from it later, so its length is no mistake."""
    # transformers warns of every text above model_max_length unless it is told not to.
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, **quiet))


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render a conversation at all."""
    if not hasattr(tokenizer, "apply_chat_template"):
        return False
    known = getattr(tokenizer, "has_chat_template", None)
    return bool(known) if known is not None else getattr(tokenizer, "chat_template", None) is not None


def apply_template(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str | None:
    """Rendered conversation, or None where the template refuses it.

    Args:
        tokenizer: See :func:`render_record`.
        messages: From :func:`with_parsed_arguments`.
        tools: What may be called, in OpenAI form.
        add_generation_prompt: End with what stands before the assistant's next answer.
    """
    keywords: dict[str, Any] = _fixed_date(tokenizer, tools)
    if add_generation_prompt:
        keywords["add_generation_prompt"] = True
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **keywords)
    except TEMPLATE_REFUSALS:
        return None
    return text if isinstance(text, str) else None


def _fixed_date(tokenizer: Any, tools: list[dict[str, Any]] | None) -> dict[str, str]:
    """Arguments that make a template which prints today's date print 1 July 2024, on every day."""
    if not hasattr(tokenizer, "get_chat_template"):
        return {}
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except TEMPLATE_REFUSALS:
        return {}
    dated = isinstance(template, str) and "strftime_now" in template
    return {"chat_template": _DATE_MACRO + template} if dated else {}


def holds_everything(
    text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> bool:
    """Whether the text shows every turn, call and tool; some templates drop what they do not know."""
    for message in messages:
        content = (message.get("content") or "").strip()
        # Tool results are often written as JSON again, so only their longest word is looked for.
        sample = (
            max(_WORD.findall(content), key=len, default="") if message["role"] == "tool" else content[:40]
        )
        if sample not in text:
            return False
        if any(call["function"]["name"] not in text for call in message.get("tool_calls") or ()):
            return False
    return all(tool.get("function", tool).get("name", "") in text for tool in tools or ())


def with_parsed_arguments(message: Message) -> Message:
    """The message with call arguments as objects, which templates expect, and content always a text."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function", call))
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = msgspec.json.decode(function["arguments"])
            except msgspec.DecodeError:
                function["arguments"] = {"text": function["arguments"]}
        calls.append({**call, "type": "function", "function": function})
    changed = {**message, "content": message.get("content") or ""}
    return {**changed, "tool_calls": calls} if calls else changed


def _is_tool_turn(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _tools_as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """The same conversation in system, user and assistant turns only."""
    turns: list[Message] = []
    if tools:
        listed = "\n".join(msgspec.json.encode(tool.get("function", tool)).decode() for tool in tools)
        turns.append(
            {
                "role": "system",
                "content": f"Tools, one a line, called by JSON with name and arguments:\n{listed}",
            }
        )
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            turns.append({"role": "user", "content": f"Tool result: {content}"})
            continue
        calls = [
            msgspec.json.encode({key: call["function"].get(key) for key in ("name", "arguments")}).decode()
            for call in message.get("tool_calls") or ()
        ]
        turns.append(
            {"role": message["role"], "content": "\n".join(part for part in (content, *calls) if part)}
        )
    return _join_neighbours(turns)


def _merge_turns(messages: Sequence[Message]) -> list[Message]:
    """Put leading system text at the head of the first user turn; the roles then alternate."""
    renamed = [{**m, "role": "user" if m["role"] in {"system", "developer"} else m["role"]} for m in messages]
    return _join_neighbours(renamed)


def _join_neighbours(messages: Sequence[Message]) -> list[Message]:
    """Join successive turns of one role, since many templates demand that roles alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(dict(message))
    return joined
