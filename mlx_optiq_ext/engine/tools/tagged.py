"""Calls written as tags: a name, then one tag per argument with its value as text.

A value that is certain to become a string streams while it is generated; the others appear when their tag
closes, read by mlx-lm's parser of the family. Used by ``block``.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from mlx_optiq_ext.engine.tools.lenient_json import dump
from mlx_optiq_ext.engine.tools.parsed import Parser, parse_one
from mlx_optiq_ext.engine.tools.reader import overlap
from mlx_optiq_ext.engine.tools.schema import coerce, properties_of
from mlx_optiq_ext.engine.tools.sink import CallSink

__all__ = ["TAGS", "TaggedCalls", "Tags"]


class Tags:
    """How one family writes them.

    Args:
        call: Opening of a call, with a group ``name``.
        argument: Opening of an argument, with a group ``key`` and perhaps a group ``type``.
        ends: What ends a value, and what ends a call; that is empty where the end of the block does it.
        strip: What the family's parser takes off a value: a line break at each end, all space, or nothing.
        words: What it does not take for a string even where the schema wants one.
        openers: First characters of values that it reads in another way.
    """

    def __init__(
        self,
        call: str,
        argument: str,
        ends: tuple[str, str],
        strip: Literal["line", "space", ""],
        words: tuple[str, ...] = (),
        openers: str = "",
    ) -> None:
        self.call = re.compile(call)
        self.argument = re.compile(argument)
        self.argument_end, self.call_end = ends
        self.strip = strip
        self.words = words
        self.openers = openers


def _named(tag: str, group: str) -> str:
    return rf"<{tag}\s+name\s*=\s*[\"']?(?P<{group}>[^\"'<>]+?)[\"']?\s*>"


_GLM = r"\s*(?P<name>[^\s<>{{}}]+)\s*(?=<{0}arg_key>)"
_GLM_ARGUMENT = r"<{0}arg_key>\s*(?P<key>[^<]*?)\s*</{0}arg_key>(?:\\n|\s)*<{0}arg_value>"
TAGS = {
    "qwen3_coder": Tags(
        r"<function=\s*(?P<name>[^\s<>]+)\s*>",
        r"<parameter=\s*(?P<key>[^\s<>]+)\s*>",
        ("</parameter>", "</function>"),
        "line",
        words=("null",),
    ),
    "glm47": Tags(_GLM.format(""), _GLM_ARGUMENT.format(""), ("</arg_value>", ""), "space"),
    "longcat": Tags(
        _GLM.format("longcat_"), _GLM_ARGUMENT.format("longcat_"), ("</longcat_arg_value>", ""), "space"
    ),
    "minimax_m2": Tags(
        _named("invoke", "name"),
        _named("parameter", "key"),
        ("</parameter>", "</invoke>"),
        "space",
        words=("null",),
    ),
    "minicpm5": Tags(
        r"(?:<function\s+name\s*=\s*)?[\"']?(?P<name>[^\"'<>=]+?)[\"']?\s*>",
        _named("param", "key"),
        ("</param>", "</function>"),
        "space",
        words=("null",),
        openers="<",
    ),
    "muse_spark": Tags(
        r"<atem:invoke\b[^>]*?\bname=\"(?P<name>[^\"]+)\">",
        r"<atem:parameter\b[^>]*?\bname=\"(?P<key>[^\"]+)\"[^>]*?>",
        ("</atem:parameter>", "</atem:invoke>"),
        "space",
        words=("true", "false", "null", "nan", "infinity"),
        openers='"[{-0123456789',
    ),
    "kimi_k3": Tags(
        r"<\|open\|>call\s(?:(?!<\|sep\|>).)*?tool=\"(?P<name>[^\"]+)\"(?:(?!<\|sep\|>).)*<\|sep\|>",
        r"<\|open\|>argument\s(?:(?!<\|sep\|>).)*?key=\"(?P<key>[^\"]+)\""
        r"(?:(?!<\|sep\|>).)*?(?:type=\"(?P<type>\w+)\")?<\|sep\|>",
        ("<|close|>argument<|sep|>", "<|close|>call<|sep|>"),
        "",
    ),
}
"""By the name of mlx-lm's parser module."""


class TaggedCalls:
    """Reads calls one after another.

    Args:
        sink: Where they go.
        tags: The family's way.
        parser: mlx-lm's parser of the family.
        wrapped: Definitions of the tools, as the parser takes them.
    """

    def __init__(self, sink: CallSink, tags: Tags, parser: Parser, wrapped: list[dict[str, Any]]) -> None:
        self._sink = sink
        self._tags = tags
        self._parser = parser
        self._wrapped = wrapped
        self._text = ""
        self._at = 0
        self._name = ""
        self._schemas: Mapping[str, Any] = {}
        self._raw: dict[str, str] = {}
        self._key: str | None = None
        self._value_at = 0
        self._lives = False
        self._began = False
        self._told = 0
        self._stray: list[str] = []

    def feed(self, text: str) -> None:
        """Read on."""
        self._text += text
        while self._step():
            pass

    def close(self) -> str:
        """The text is over: end an open call; what of the text belongs to no call."""
        if self._key is not None:
            self._end_value(len(self._text) - overlap(self._text, self._tags.argument_end))
        if self._sink.is_open:
            self._end_call(len(self._text))
        return "".join(self._stray) + self._text

    def _step(self) -> bool:
        if self._key is not None:
            return self._in_value()
        if self._sink.is_open:
            return self._in_call()
        found = self._tags.call.search(self._text)
        if found is None:
            return False
        self._stray.append(self._text[: found.start()])
        self._text, self._at = self._text[found.start() :], found.end() - found.start()
        self._name, self._raw = found["name"].strip(), {}
        self._schemas = properties_of(self._sink.tool(self._name))
        self._sink.start(self._name)
        return True

    def _in_call(self) -> bool:
        found = self._tags.argument.search(self._text, self._at)
        end = self._text.find(self._tags.call_end, self._at) if self._tags.call_end else -1
        if end >= 0 and (found is None or end < found.start()):
            self._end_call(end + len(self._tags.call_end))
            return True
        if found is None:
            return False
        self._key, self._value_at, self._at = found["key"].strip(), found.end(), found.end()
        self._lives = self._is_text(found.groupdict().get("type"))
        self._began, self._told = False, 0
        return True

    def _is_text(self, written_type: str | None) -> bool:
        """Whether the family's parser takes the value of this argument for a string, whatever it is."""
        if written_type is not None:
            return written_type == "string"
        schema = self._schemas.get(self._key or "")
        return (
            isinstance(schema, dict)
            and schema.get("type") == "string"
            and not {"enum", "const", "anyOf", "oneOf", "allOf"} & schema.keys()
            and self._key not in self._raw
        )

    def _in_value(self) -> bool:
        end = self._text.find(self._tags.argument_end, self._at)
        if end >= 0:
            self._end_value(end)
            return True
        limit = len(self._text) - overlap(self._text, self._tags.argument_end)
        self._at = max(self._at, limit)
        if self._lives:
            self._tell(limit)
        return False

    def _tell(self, limit: int) -> None:
        """Tell the string so far; space at its end waits, since the parser may take it off."""
        piece = self._text[self._value_at + self._told : limit]
        if not self._began:
            stripped = _lstrip(piece, self._tags.strip)
            self._lives = stripped[:1] not in self._tags.openers or not stripped
            if not stripped or not self._lives or self._is_word(stripped):
                return
            self._value_at += len(piece) - len(stripped)
            piece = stripped
            self._sink.add(f'{", " if self._raw else "{"}{dump(self._key)}: "')
            self._began = True
        piece = _rstrip(piece, self._tags.strip)
        self._told += len(piece)
        self._sink.add(dump(piece)[1:-1])

    def _is_word(self, start: str) -> bool:
        """Whether a value that begins like this may be a word that the parser takes for something else."""
        return any(word.startswith(start.rstrip().lower()) for word in self._tags.words)

    def _end_value(self, end: int) -> None:
        assert self._key is not None
        text = self._text[self._value_at : end]
        self._raw[self._key] = _rstrip(
            text if self._began else _lstrip(text, self._tags.strip), self._tags.strip
        )
        self._key = None
        self._at = min(len(self._text), end + len(self._tags.argument_end))
        self._sink.grow(dump(self._arguments(self._at))[:-1])

    def _end_call(self, end: int) -> None:
        self._sink.end(dump(self._arguments(end)))
        self._text, self._at = self._text[end:], 0

    def _arguments(self, end: int) -> dict[str, Any]:
        """Arguments of the call so far: as the family's parser reads them, else as they are written."""
        end_mark = self._tags.call_end
        closing = "" if end_mark and self._text.endswith(end_mark, 0, end) else end_mark
        parsed = parse_one(self._parser, self._text[:end] + closing, self._wrapped)
        found = parsed.arguments if parsed is not None else {}
        read = {key: found.get(key, raw) for key, raw in self._raw.items()} if self._raw else found
        return {key: coerce(value, self._schemas.get(key)) for key, value in read.items()}


def _lstrip(text: str, strip: str) -> str:
    return text.lstrip() if strip == "space" else text.removeprefix("\n") if strip == "line" else text


def _rstrip(text: str, strip: str) -> str:
    return text.rstrip() if strip == "space" else text.removesuffix("\n") if strip == "line" else text
