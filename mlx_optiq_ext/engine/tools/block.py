"""One block of calls between a model's markers: which reader it needs, and what to do where none can read it.

Knows the readers and mlx-lm's parsers, not where blocks begin and end; ``decode`` tells that.
"""

from collections.abc import Sequence

import msgspec

from mlx_optiq_ext.engine.tools.delimited import DELIMITERS, DelimitedCalls
from mlx_optiq_ext.engine.tools.headers import HEADERS
from mlx_optiq_ext.engine.tools.json_calls import JsonCalls
from mlx_optiq_ext.engine.tools.lenient_json import dump
from mlx_optiq_ext.engine.tools.parsed import Parser, definitions, parse
from mlx_optiq_ext.engine.tools.reader import CallReader
from mlx_optiq_ext.engine.tools.sink import CallSink
from mlx_optiq_ext.engine.tools.tagged import TAGS, TaggedCalls
from mlx_optiq_ext.types.chat import ToolSpec

__all__ = ["CallBlock", "CallSyntax"]

_NOISE = " \t\r\n[](){},;`"
"""Brackets and commas that are left over around calls."""


class CallSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """How a model writes calls."""

    start: str = "<tool_call>"
    end: str = "</tool_call>"
    """Empty: the end of the turn."""
    parser: Parser | None = None
    """mlx-lm's; None: JSON, as our own description of tools asks for."""

    @property
    def family(self) -> str:
        """Name of the parser's module."""
        return self.parser.__module__.rpartition(".")[2] if self.parser is not None else "json_tools"


class CallBlock:
    """Reads one block.

    Args:
        syntax: How the model writes calls.
        sink: Where they go.
        tools: What may be called.
    """

    def __init__(self, syntax: CallSyntax, sink: CallSink, tools: Sequence[ToolSpec]) -> None:
        self._syntax = syntax
        self._sink = sink
        self._wrapped = definitions(tools)
        self._first = sink.num_calls
        self._reader: CallReader | None = None
        self._raw: list[str] = []

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._sink.num_calls > self._first

    @property
    def has_ended_calls(self) -> bool:
        """Whether calls have begun and all of them ended."""
        return self.has_calls and not self._sink.is_open

    def feed(self, text: str) -> None:
        """Read on."""
        if not self.has_calls:
            self._raw.append(text)
        if self._reader is None:
            text = "".join(self._raw)
            self._reader = self._choose(text.lstrip())
        if self._reader is not None:
            self._reader.feed(text)

    def close(self, ending: str, *, is_whole: bool) -> str:
        """The block is over: end an open call, unless it was cut: a half call is none that could be run.

        Args:
            ending: The end marker that was read; empty where there was none.
            is_whole: Whether the model ended by itself, so that a missing marker was only forgotten.
        Returns:
            Text that is no call and has to be shown; with its markers where there was no call at all.
        """
        if self._sink.is_open and not ending and not is_whole:
            self._sink.cut()
            return ""
        rest = self._reader.close() if self._reader is not None else ""
        if self.has_calls:
            for marker in HEADERS[self._syntax.family].skipped if self._syntax.family in HEADERS else ():
                rest = rest.replace(marker, "")
            return rest if rest.strip(_NOISE) else ""
        raw = "".join(self._raw)
        if self._syntax.parser is not None and (ending or is_whole):
            calls = parse(self._syntax.parser, raw, self._wrapped)
            # Some parsers take any text for a call, so here only names count that there are.
            if calls and all(self._sink.tool(call.name) is not None for call in calls):
                for call in calls:
                    self._sink.start(call.name)
                    self._sink.end(dump(call.arguments))
                return ""
        return self._syntax.start + raw + ending

    def _choose(self, text: str) -> CallReader | None:
        """The reader for a block that begins like this; None: not certain yet, or there is none."""
        if not text:
            return None
        family, parser = self._syntax.family, self._syntax.parser
        if text[0] == "[" and not text[1:].strip():
            return None
        if text[0] in "{`" or text[1:].lstrip()[:1] == "{" == text[0].replace("[", "{"):
            return JsonCalls(self._sink, header=HEADERS.get(family))
        if parser is None or family in HEADERS or family == "json_tools":
            return JsonCalls(self._sink, header=HEADERS.get(family))
        if family in TAGS:
            return TaggedCalls(self._sink, TAGS[family], parser, self._wrapped)
        if family in DELIMITERS:
            return DelimitedCalls(self._sink, DELIMITERS[family], parser, self._wrapped)
        return None
