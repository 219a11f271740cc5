"""The items of an answer while they grow: each knows its parts and the events that tell of them.

An event here lacks what only the stream knows: its number, and the place of the item. Called by
``from_events``; knows no protocol but the shapes of items.

Source: OpenAI Responses API, "Streaming events".
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import msgspec

from mlx_optiq_ext.serve.responses.items import new_id
from mlx_optiq_ext.serve.responses.tools import INPUT, Origin
from mlx_optiq_ext.serve.unseen import conceal
from mlx_optiq_ext.types.events import TokenLogprob, ToolCallStart

__all__ = ["CallItem", "CustomCallItem", "MessageItem", "OutputItem", "RawReasoningItem", "SummaryItem"]

Lines: TypeAlias = list[dict[str, Any]]


class OutputItem(Protocol):
    """One item of the answer."""

    item: dict[str, Any]
    """As it is now."""

    def begin(self) -> Lines:
        """What follows ``response.output_item.added``."""

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Lines:
        """Take more of what it holds."""

    def end(self) -> Lines:
        """What comes before ``response.output_item.done``; the item is whole then."""


class _Texts:
    """One part of text in an item, however it is called."""

    def __init__(self, names: tuple[str, str], part: dict[str, Any], place: dict[str, int]) -> None:
        self._part_events, self._text_events = names
        self.part = part
        self._place = place
        self._texts: list[str] = []

    def begin(self) -> Lines:
        return [{"type": f"{self._part_events}.added", **self._place, "part": dict(self.part)}]

    def add(self, text: str, **values: Any) -> Lines:
        self._texts.append(text)
        return [{"type": f"{self._text_events}.delta", **self._place, "delta": text, **values}]

    def end(self, **values: Any) -> Lines:
        self.part["text"] = text = "".join(self._texts)
        return [
            {"type": f"{self._text_events}.done", **self._place, "text": text, **values},
            {"type": f"{self._part_events}.done", **self._place, "part": dict(self.part)},
        ]


class MessageItem:
    """Visible text."""

    def __init__(self) -> None:
        self.item: dict[str, Any] = {
            "type": "message",
            "id": new_id("message"),
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        self._logprobs: list[dict[str, Any]] = []
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._texts = _Texts(("response.content_part", "response.output_text"), part, {"content_index": 0})

    def begin(self) -> Lines:
        """Open the one part."""
        return self._texts.begin()

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Lines:
        """Take more text."""
        told = [_logprob(each) for each in logprobs]
        self._logprobs += told
        return self._texts.add(text, logprobs=told)

    def end(self) -> Lines:
        """Close the part."""
        self._texts.part["logprobs"] = self._logprobs
        lines = self._texts.end(logprobs=self._logprobs)
        self.item["content"] = [self._texts.part]
        return lines


class _ReasoningItem:
    """Thoughts in one part, which is a summary or the raw text."""

    def __init__(self, texts: _Texts, *, sealed: bool) -> None:
        self.item: dict[str, Any] = {
            "type": "reasoning",
            "id": new_id("reasoning"),
            "status": "in_progress",
            "summary": [],
        }
        self._texts = texts
        self._sealed = sealed

    def begin(self) -> Lines:
        """Open the one part."""
        return self._texts.begin()

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Lines:  # noqa: ARG002 - of text only
        """Take more thoughts."""
        return self._texts.add(text)

    def end(self) -> Lines:
        """Close the part; ``encrypted_content`` holds all of it where it was asked for."""
        lines = self._texts.end()
        if self._sealed:
            self.item["encrypted_content"] = conceal(self._texts.part["text"])
        return lines


class SummaryItem(_ReasoningItem):
    """Thoughts shown as their summary, for clients that ask for one."""

    def __init__(self, *, sealed: bool) -> None:
        names = ("response.reasoning_summary_part", "response.reasoning_summary_text")
        super().__init__(
            _Texts(names, {"type": "summary_text", "text": ""}, {"summary_index": 0}), sealed=sealed
        )

    def end(self) -> Lines:
        """Close the part and keep it."""
        lines = super().end()
        self.item["summary"] = [self._texts.part]
        return lines


class RawReasoningItem(_ReasoningItem):
    """Thoughts shown as what they are."""

    def __init__(self, *, sealed: bool) -> None:
        names = ("response.content_part", "response.reasoning_text")
        super().__init__(
            _Texts(names, {"type": "reasoning_text", "text": ""}, {"content_index": 0}), sealed=sealed
        )

    def end(self) -> Lines:
        """Close the part and keep it."""
        lines = super().end()
        self.item["content"] = [self._texts.part]
        return lines


class CallItem:
    """A call of a function."""

    def __init__(self, call: ToolCallStart, origin: Origin) -> None:
        self.item = _call_item("function_call", call, origin)
        self.item["arguments"] = ""
        self._pieces: list[str] = []

    def begin(self) -> Lines:
        """Nothing more to open."""
        return []

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Lines:  # noqa: ARG002 - of text only
        """Take more of the arguments."""
        self._pieces.append(text)
        return [{"type": "response.function_call_arguments.delta", "delta": text}]

    def end(self) -> Lines:
        """The arguments are whole."""
        self.item["arguments"] = arguments = "".join(self._pieces)
        done = {"type": "response.function_call_arguments.done", "arguments": arguments}
        return [{**done, "name": self.item["name"]}]


class CustomCallItem:
    """A call of a custom tool: its text is known when the arguments that hold it are whole."""

    def __init__(self, call: ToolCallStart, origin: Origin) -> None:
        self.item = _call_item("custom_tool_call", call, origin)
        self.item["input"] = ""
        self._pieces: list[str] = []

    def begin(self) -> Lines:
        """Nothing more to open."""
        return []

    def add(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Lines:  # noqa: ARG002 - of text only
        """Take more of the arguments."""
        self._pieces.append(text)
        return []

    def end(self) -> Lines:
        """Tell the text at once."""
        self.item["input"] = text = _text_of("".join(self._pieces))
        event = "response.custom_tool_call_input"
        return [{"type": f"{event}.delta", "delta": text}, {"type": f"{event}.done", "input": text}]


def _call_item(kind: str, call: ToolCallStart, origin: Origin) -> dict[str, Any]:
    item: dict[str, Any] = {
        "type": kind,
        "id": new_id(kind),
        "status": "in_progress",
        "call_id": f"call_{call.id.removeprefix('call')}",
        "name": origin.name,
    }
    return item if origin.namespace is None else {**item, "namespace": origin.namespace}


def _text_of(arguments: str) -> str:
    """The one string in a custom tool's arguments; all of them where the model gave something else."""
    try:
        values = msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.DecodeError:
        return arguments
    text = values.get(INPUT)
    return text if isinstance(text, str) else arguments


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    values = {"token": token.token, "bytes": list(token.token_bytes), "logprob": token.logprob}
    return {**values, "top_logprobs": [_logprob_of_top(top) for top in token.top]}


def _logprob_of_top(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": list(token.token_bytes), "logprob": token.logprob}
