"""One training example, read from a row of a data set, or what is wrong with the row.

Knows the accepted forms and nothing of files, tokenizers or masks. Called by ``lora`` and by the dashboard.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

__all__ = [
    "FORMS",
    "Completion",
    "Conversation",
    "Example",
    "Message",
    "PlainText",
    "Preference",
    "parse_preference",
    "parse_sft",
]

Message: TypeAlias = dict[str, Any]
"""OpenAI form: role, content, tool_calls, tool_call_id."""

FORMS: dict[Literal["sft", "dpo"], str] = {
    "sft": '{"messages": […], "tools": […]}, {"prompt": …, "completion": …} or {"text": …}',
    "dpo": '{"prompt": …, "chosen": …, "rejected": …}, each a text or messages',
}
"""Rows that are accepted, per method, in words for messages."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """Messages with at least one answer of the assistant."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and how it goes on."""

    where: str
    prompt: str
    completion: str


class PlainText(msgspec.Struct, frozen=True, kw_only=True):
    """A document; every token of it is learnt."""

    where: str
    text: str


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to one prompt, the first of which is the better one."""

    where: str
    chosen: Conversation | Completion
    rejected: Conversation | Completion


Example: TypeAlias = Conversation | Completion | PlainText | Preference


class _RowError(Exception):
    """What is wrong with a row; caught in this module."""


def parse_sft(row: object, where: str) -> Conversation | Completion | PlainText | str:
    """Read an example to imitate.

    Args:
        row: A decoded JSON value; columns that no form knows are ignored.
        where: File and line.
    Returns:
        The example, or what is wrong with the row.
    """
    try:
        return _parse_sft(_as_object(row), where)
    except _RowError as problem:
        return str(problem)


def parse_preference(row: object, where: str) -> Preference | str:
    """Read a pair of answers.

    Answers are texts, messages of the assistant, or whole conversations that share their beginning.

    Args:
        row: A decoded JSON value; columns that no form knows are ignored.
        where: File and line.
    Returns:
        The pair, or what is wrong with the row.
    """
    try:
        return _parse_preference(_as_object(row), where)
    except _RowError as problem:
        return str(problem)


def _parse_sft(row: dict[str, Any], where: str) -> Conversation | Completion | PlainText:
    tools = _tools(row)
    if row.get("messages") is not None:
        return _conversation(where, _messages(row["messages"], "messages"), tools)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        return _answer(where, prompt, completion, tools, "completion")
    if tools:
        raise _RowError("tools without messages")
    if row.get("text") is not None:
        return PlainText(where=where, text=_text(row["text"], "text"))
    raise _RowError(f"none of the known forms (it has {', '.join(sorted(row)) or 'no columns'})")


def _parse_preference(row: dict[str, Any], where: str) -> Preference:
    tools, prompt = _tools(row), row.get("prompt")
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise _RowError(f"no {' and no '.join(missing)}")
    answers = [row["chosen"], row["rejected"]]
    if all(_is_conversation(answer) for answer in answers):
        chosen, rejected = (
            _conversation(where, _messages(answer, name), tools)
            for answer, name in zip(answers, ("chosen", "rejected"), strict=True)
        )
        _require_shared_prompt(chosen, rejected)
        pair = Preference(where=where, chosen=chosen, rejected=rejected)
    elif prompt is None:
        raise _RowError("no prompt, and chosen and rejected are not both whole conversations")
    else:
        pair = Preference(
            where=where,
            chosen=_answer(where, prompt, answers[0], tools, "chosen"),
            rejected=_answer(where, prompt, answers[1], tools, "rejected"),
        )
    if pair.chosen == pair.rejected:
        raise _RowError("chosen and rejected are the same")
    return pair


def _as_object(row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _RowError(f"a JSON {type(row).__name__}, not an object")
    return row


def _answer(
    where: str, prompt: object, answer: object, tools: tuple[dict[str, Any], ...], name: str
) -> Conversation | Completion:
    """An answer to a prompt; messages where either of them is."""
    if isinstance(prompt, str) and isinstance(answer, str) and not tools:
        return Completion(where=where, prompt=_text(prompt, "prompt"), completion=_text(answer, name))
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    messages = (*_messages(asked, "prompt"), *_messages(said, name))
    return _conversation(where, messages, tools)


def _conversation(
    where: str, messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...]
) -> Conversation:
    if messages[0]["role"] == "assistant":
        raise _RowError("the first message is the assistant's: there is nothing that it answers")
    if not any(message["role"] == "assistant" for message in messages):
        raise _RowError("no message is the assistant's: there is nothing to learn")
    return Conversation(where=where, messages=messages, tools=tools)


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _RowError(f"{name} is {_kind(value)}, not a list of messages")
    for position, message in enumerate(value):
        spot = f"{name}[{position}]"
        if not isinstance(message, dict):
            raise _RowError(f"{spot} is {_kind(message)}, not a message")
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise _RowError(f"{spot} has role {role!r}; roles are {', '.join(_ROLES)}")
        if not isinstance(content, str | None):
            raise _RowError(f"content of {spot} is {_kind(content)}; only text can be learnt")
        if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
            raise _RowError(f"{spot}, an answer, has neither content nor tool_calls")
        _require_calls(message.get("tool_calls"), spot)
    # A data set of columns writes null where a message lacks a field that another one has.
    return tuple({key: field for key, field in message.items() if field is not None} for message in value)


def _require_calls(calls: object, spot: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list | tuple):
        raise _RowError(f"tool_calls of {spot} is {_kind(calls)}, not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _RowError(f"a call of {spot} has no function name")


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if not tools:
        return ()
    named = isinstance(tools, list | tuple) and all(
        isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
    )
    if not named or not all(isinstance(tool.get("function", tool).get("name"), str) for tool in tools):
        raise _RowError('tools is not a list of {"type": "function", "function": {"name": …}}')
    return tuple(tools)


def _is_conversation(answer: object) -> bool:
    """Whether an answer is a whole conversation: messages that someone else than the assistant begins."""
    is_list = isinstance(answer, list | tuple) and bool(answer) and isinstance(answer[0], dict)
    return is_list and answer[0].get("role") != "assistant"  # type: ignore[index]


def _require_shared_prompt(chosen: Conversation, rejected: Conversation) -> None:
    """Two conversations must differ in their last turn of the assistant and in nothing before it."""
    prompts: list[Sequence[Message]] = []
    for conversation, name in ((chosen, "chosen"), (rejected, "rejected")):
        if conversation.messages[-1]["role"] != "assistant":
            raise _RowError(f"the last message of {name} is not the assistant's")
        prompts.append(conversation.messages[:-1])
    if prompts[0] != prompts[1]:
        raise _RowError("chosen and rejected differ before their last message; they must share the prompt")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{name} is {_kind(value)}, not text")
    if not value.strip():
        raise _RowError(f"{name} is empty")
    return value


def _kind(value: object) -> str:
    return "empty" if value in ([], "", {}) else "missing" if value is None else f"a {type(value).__name__}"
