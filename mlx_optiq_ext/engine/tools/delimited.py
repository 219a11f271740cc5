"""Calls written like code: ``name(key=value, …)`` or ``call:name{key:value,…}``.

An argument appears when the comma after it does, read by mlx-lm's parser of the family; a string whose quotes
are markers of their own streams while it is generated. Used by ``block``.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.engine.tools.lenient_json import dump
from mlx_optiq_ext.engine.tools.parsed import Parser, parse_one
from mlx_optiq_ext.engine.tools.reader import overlap
from mlx_optiq_ext.engine.tools.schema import coerce, properties_of, types_of
from mlx_optiq_ext.engine.tools.sink import CallSink

__all__ = ["DELIMITERS", "DelimitedCalls", "Delimiters"]


class Delimiters:
    """How one family writes them.

    Args:
        call: Name and opening bracket, with a group ``name``.
        close: The closing bracket.
        around: What the parser wants before and after a single call.
        quotes: What strings stand between.
        streams: Whether a string has no escapes, so that it can be told before it ends.
    """

    def __init__(
        self, call: str, close: str, around: tuple[str, str], quotes: tuple[str, ...], *, streams: bool
    ) -> None:
        self.call = re.compile(call)
        self.close = close
        self.around = around
        self.streams = streams
        self.quotes = quotes
        inside = r"\\." if not streams else r"(?!)"
        marks = "|".join(map(re.escape, quotes))
        self.marks = re.compile(rf"{inside}|{marks}|[{{}}\[\](),]", re.DOTALL)


DELIMITERS = {
    "pythonic": Delimiters(r"(?P<name>[A-Za-z_][\w.]*)\(", ")", ("[", "]"), ('"', "'"), streams=False),
    "gemma4": Delimiters(r"call:(?P<name>[\w-]+)\{", "}", ("", ""), ('<|"|>',), streams=True),
    "function_gemma": Delimiters(r"call:(?P<name>\w+)\{", "}", ("", ""), ("<escape>",), streams=True),
}
"""By the name of mlx-lm's parser module."""

_KEY = re.compile(r"[{,]\s*([\w-]+)\s*:\s*$")


class DelimitedCalls:
    """Reads calls one after another.

    Args:
        sink: Where they go.
        delimiters: The family's way.
        parser: mlx-lm's parser of the family.
        wrapped: Definitions of the tools, as the parser takes them.
    """

    def __init__(
        self, sink: CallSink, delimiters: Delimiters, parser: Parser, wrapped: list[dict[str, Any]]
    ) -> None:
        self._sink = sink
        self._marks = delimiters
        self._parser = parser
        self._wrapped = wrapped
        self._text = ""
        self._at = 0
        self._depth = 0
        self._quote = ""
        self._told_to: int | None = None
        self._schemas: Mapping[str, Any] = {}
        self._num_told = 0
        self._stray: list[str] = []

    def feed(self, text: str) -> None:
        """Read on."""
        self._text += text
        self._read(is_end=False)

    def close(self) -> str:
        """The text is over: end an open call; what of the text belongs to no call."""
        self._read(is_end=True)
        if self._sink.is_open:
            self._end_call(self._text + self._quote + self._marks.close)
            self._text = ""
        return "".join(self._stray) + self._text

    def _read(self, *, is_end: bool) -> None:
        while True:
            if not self._sink.is_open and not self._begin():
                return
            held = 0 if is_end else max(overlap(self._text, quote) for quote in self._marks.quotes)
            found = self._marks.marks.search(self._text, self._at, len(self._text) - held)
            if found is None:
                self._tell(len(self._text) - held)
                # The last character may be the backslash of an escape, so it is looked at again.
                self._at = max(self._at, len(self._text) - max(held, 1))
                return
            self._mark(found)

    def _begin(self) -> bool:
        found = self._marks.call.search(self._text)
        if found is None:
            return False
        self._stray.append(self._text[: found.start()])
        self._text, self._at = self._text[found.start() :], found.end() - found.start()
        self._depth, self._quote, self._num_told, self._told_to = 1, "", 0, None
        self._schemas = properties_of(self._sink.tool(found["name"]))
        self._sink.start(found["name"])
        return True

    def _mark(self, found: re.Match[str]) -> None:
        mark = found.group()
        self._at = found.end()
        if self._quote:
            if mark == self._quote:
                self._tell(found.start())
                self._quote, self._told_to = "", None
        elif mark in self._marks.quotes:
            self._quote = mark
            self._open_string(found)
        elif mark in "{[(":
            self._depth += 1
        elif mark in "}])":
            self._depth -= 1
            if self._depth == 0:
                self._end_call(self._text[: self._at])
                self._text, self._at = self._text[self._at :], 0
        elif mark == "," and self._depth == 1:
            self._sink.grow(dump(self._arguments(self._text[: found.start()] + self._marks.close))[:-1])

    def _open_string(self, found: re.Match[str]) -> None:
        """A string that is an argument's whole value can be told as it comes."""
        before = self._text[max(0, found.start() - 200) : found.start()]
        key = _KEY.search(before) if self._marks.streams and self._depth == 1 else None
        types = types_of(self._schemas.get(key[1])) if key is not None else None
        if key is None or (types and "string" not in types):
            return
        done = self._arguments(self._text[: found.start() - len(key[0])] + self._marks.close)
        if key[1] not in done and self._sink.grow(dump(done)[:-1]):
            self._sink.add(f'{", " if done else ""}{dump(key[1])}: "')
            self._told_to = self._at

    def _tell(self, limit: int) -> None:
        if self._told_to is not None and self._quote:
            self._sink.add(dump(self._text[self._told_to : limit])[1:-1])
            self._told_to = limit

    def _end_call(self, text: str) -> None:
        parsed = self._one(text)
        self._sink.end(dump(self._coerced(parsed)) if parsed is not None else None)

    def _arguments(self, text: str) -> dict[str, Any]:
        return self._coerced(self._one(text) or {})

    def _one(self, text: str) -> dict[str, Any] | None:
        before, after = self._marks.around
        parsed = parse_one(self._parser, before + text + after, self._wrapped)
        return parsed.arguments if parsed is not None else None

    def _coerced(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: coerce(value, self._schemas.get(key)) for key, value in arguments.items()}
