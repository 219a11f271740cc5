"""A byte tokenizer with markers, wrapped as mlx-lm wraps one, and canned calls of every family."""

import importlib
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from support_models import byte_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlx_optiq_ext.engine.decode import AnswerDecoder
from mlx_optiq_ext.types.chat import Generation, ToolSpec
from mlx_optiq_ext.types.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)

WEATHER = ToolSpec(
    name="get_weather",
    description="Weather of a place.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
WRITE = ToolSpec(
    name="write_file",
    description="Write a file.",
    parameters={
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "content": {"type": "string"},
            "lines": {"type": "array", "items": {"type": "integer"}},
            "force": {"type": "boolean"},
        },
    },
)
TOOLS = (WEATHER, WRITE)


def tokenizer(*, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per byte and one per marker; ``plain`` ones are added tokens that are not special."""
    made = byte_tokenizer(300)
    made.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in special]})
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return made


def wrapper(
    family: str | None = None, *, thinks: bool = False, made: PreTrainedTokenizerFast | None = None
) -> TokenizerWrapper:
    """mlx-lm's wrapper of such a tokenizer with the parser of a family."""
    made = made if made is not None else tokenizer(plain=("<think>", "</think>") if thinks else ())
    how: dict[str, Any] = {}
    if family is not None:
        parser = importlib.import_module(f"mlx_lm.tool_parsers.{family}")
        how = {
            "tool_call_start": parser.tool_call_start,
            "tool_call_end": parser.tool_call_end,
            "tool_parser": parser.parse_tool_call,
        }
    return TokenizerWrapper(made, BPEStreamingDetokenizer, **how)


def decoded(
    text: str,
    wrapped: TokenizerWrapper,
    request: Generation | None = None,
    *,
    starts_reasoning: bool = False,
    reason: Any = "stop",
) -> list[Event]:
    """Events of an answer, fed token by token."""
    request = request if request is not None else Generation(tools=TOOLS)
    decoder = AnswerDecoder(wrapped, request, starts_reasoning=starts_reasoning)
    events: list[Event] = []
    for token in wrapped.encode(text, add_special_tokens=False):
        events += decoder.feed(token)
    return [*events, *decoder.finish(reason)]


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def reasoning(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta))


def calls(events: list[Event], *, is_cut: bool = False) -> list[tuple[str, str]]:
    """Name and arguments of every call, after checking that its events are in order and agree.

    Where the answer was cut, the last one may have no end; it is left out.
    """
    found: list[tuple[str, str]] = []
    start: ToolCallStart | None = None
    told = ""
    for event in events:
        if isinstance(event, ToolCallStart):
            assert start is None
            assert event.index == len(found)
            assert len(event.id) == 28
            assert event.id.isalnum()
            start, told = event, ""
        elif isinstance(event, ToolCallDelta):
            assert start is not None
            assert event.index == start.index
            told += event.arguments
        elif isinstance(event, ToolCallEnd):
            assert start is not None
            assert (event.index, event.id, event.name) == (start.index, start.id, start.name)
            assert event.arguments == told
            found.append((event.name, told))
            start = None
        else:
            assert start is None
    assert start is None or is_cut
    return found


def cut_call(events: list[Event]) -> tuple[str, str] | None:
    """Name and beginning of the arguments of the call that has no end."""
    ended = {event.index for event in events if isinstance(event, ToolCallEnd)}
    for start in events:
        if isinstance(start, ToolCallStart) and start.index not in ended:
            told = [e.arguments for e in events if isinstance(e, ToolCallDelta) and e.index == start.index]
            return start.name, "".join(told)
    return None
