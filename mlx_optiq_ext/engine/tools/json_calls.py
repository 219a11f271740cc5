"""Calls whose arguments are JSON: objects with name and arguments, or a written name and then an object.

Knows the shapes that models give such objects, not where they stand. Used for marked blocks by ``block``, for
answers that are nothing but a call by ``bare``.
"""

import json
import re
from typing import Literal, Protocol

from mlx_optiq_ext.engine.tools.headers import Header
from mlx_optiq_ext.engine.tools.lenient_json import LenientJson, StringReader
from mlx_optiq_ext.engine.tools.schema import properties_of
from mlx_optiq_ext.engine.tools.sink import CallSink

__all__ = ["JsonCalls"]

_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "function", "tool")
_OTHERS = ("type", "id", "call_id")
_BETWEEN = re.compile(r"[,;\[\]]|```(?:json|tool_call)?(?=\s)|")
_LONGEST_HEADER = 400
_FENCE = re.compile(r"`{1,3}[a-z_]*")


class _Arguments:
    """The JSON object of one call's arguments, or a JSON string that holds one."""

    def __init__(self, sink: CallSink, name: str) -> None:
        self._json = LenientJson(properties_of(sink.tool(name)) if name else None)
        self._quoted: StringReader | None = None
        self._began = False

    @property
    def is_object(self) -> bool:
        return self._json.is_object

    @property
    def done(self) -> bool:
        return self._quoted.done if self._quoted is not None else self._json.done

    @property
    def failed(self) -> bool:
        return self._json.failed or (self._json.done and not self._json.is_object)

    def take(self) -> str:
        return self._json.take() if self._json.is_object else ""

    def feed(self, text: str) -> str:
        if not self._began:
            text = text.lstrip()
            if not text:
                return ""
            self._began = True
            if text[0] in "\"'":
                self._quoted, text = StringReader(text[0]), text[1:]
        if self._quoted is None:
            return self._json.feed(text)
        decoded, rest = self._quoted.feed(text)
        self._json.feed(decoded)
        return rest

    def close(self) -> None:
        self._json.close()


class _Call(Protocol):
    """One call being read; ``feed`` returns what comes after it."""

    done: bool
    failed: bool

    def feed(self, text: str) -> str: ...
    def close(self) -> None: ...


class _Named:
    """The arguments after a header that told the name."""

    def __init__(self, sink: CallSink, name: str) -> None:
        self.done = self.failed = False
        self._sink = sink
        self._arguments = _Arguments(sink, name)
        sink.start(name)

    def feed(self, text: str) -> str:
        rest = self._arguments.feed(text)
        self._sink.add(self._arguments.take())
        self.done, self.failed = self._arguments.done, self._arguments.failed
        return rest

    def close(self) -> None:
        self._arguments.close()
        self._sink.add(self._arguments.take())


class _Object:
    """An object that holds name and arguments, at its top or under one key."""

    def __init__(self, sink: CallSink, *, strict: bool) -> None:
        self.done = self.failed = False
        self._sink = sink
        self._strict = strict
        self._state: Literal["open", "key", "colon", "value", "next"] = "open"
        self._depth = 0
        self._key = ""
        self._value: LenientJson | _Arguments | None = None
        self._name = ""
        self._has_arguments = False
        self._early: list[str] = []

    def feed(self, text: str) -> str:
        while text and not self.done and not self.failed:
            if self._value is not None:
                text = self._in_value(self._value, text)
                continue
            text = text.lstrip()
            if text:
                text = self._at_token(text)
        return text

    def close(self) -> None:
        if isinstance(self._value, _Arguments):
            self._value.close()
            self._tell(self._value)

    def _at_token(self, text: str) -> str:
        character, state = text[0], self._state
        if state in ("open", "value") and character == "{" and (state == "open" or self._descends()):
            self._depth += 1
            self._state = "key"
        elif state == "value":
            is_new = self._key in _ARGUMENTS and not self._has_arguments
            self._value = _Arguments(self._sink, self._name) if is_new else LenientJson()
            return text
        elif state == "key" and character in "\"'":
            self._value = LenientJson()
            return text
        elif state == "colon" and character == ":":
            self._state = "value"
            self.failed = self._strict and self._key not in (*_ARGUMENTS, *_NAMES, *_OTHERS)
        elif state == "next" and character == ",":
            self._state = "key"
        elif state in ("next", "key") and character == "}":
            self._depth -= 1
            self._state = "next"
            self.done = self._depth == 0
            self.failed = self.done and not self._sink.is_open
        else:
            self.failed = True
            return text
        return text[1:]

    def _descends(self) -> bool:
        return self._key in _NAMES and not self._name

    def _in_value(self, value: "LenientJson | _Arguments", text: str) -> str:
        rest = value.feed(text)
        self.failed = value.failed
        if isinstance(value, _Arguments):
            self._tell(value)
        if value.done and not self.failed:
            self._value = None
            if isinstance(value, LenientJson):
                self._plain_value(json.loads(value.take()))
            else:
                self._state = "next"
        return rest

    def _plain_value(self, value: object) -> None:
        """A key, or the value of one that is not the arguments."""
        if self._state == "key":
            self._key, self._state = str(value), "colon"
            return
        self._state = "next"
        if self._key in _NAMES and isinstance(value, str) and not self._name:
            self._name = value.strip()
            is_known = self._sink.tool(self._name) is not None
            self.failed = self._strict and not is_known
            if self._name and not self.failed and (self._has_arguments or (is_known and not self._strict)):
                self._start()

    def _tell(self, arguments: _Arguments) -> None:
        piece = arguments.take()
        self._has_arguments = self._has_arguments or arguments.is_object
        self._early.append(piece)
        if self._name and self._has_arguments:
            self._start()

    def _start(self) -> None:
        if not self._sink.is_open:
            self._sink.start(self._name)
        self._sink.add("".join(self._early))
        self._early.clear()


class JsonCalls:
    """Reads calls one after another, in a list or not.

    Args:
        sink: Where they go.
        header: How a name is written before its arguments, where the syntax has that.
        strict: Take only an object with the name of a known tool, an object of arguments, and nothing else
            that calls do not have; for text that nothing marks as a call.
    """

    def __init__(self, sink: CallSink, *, header: Header | None = None, strict: bool = False) -> None:
        self.failed = False
        """Whether the text stopped being calls."""
        self.unsure = ""
        """Text that may still become a call, or turn out to be none."""
        self._sink = sink
        self._header = header
        self._strict = strict
        self._call: _Call | None = None

    def feed(self, text: str) -> None:
        """Read on."""
        if self.failed or self._call is None:
            self.unsure += text
            text = ""
        while not self.failed:
            if self._call is None:
                text = self._next_call()
                if self._call is None:
                    return
            rest = self._call.feed(text)
            self.unsure = "" if self._sink.is_open else self.unsure + text[: len(text) - len(rest)]
            text = rest
            if self._call.failed:
                self._end()
                self.failed = True
                self.unsure += text
            elif not self._call.done:
                return
            else:
                self._end()
                self.unsure = text

    def close(self) -> str:
        """The text is over: end an open call; what of the text belongs to no call."""
        if self._call is not None:
            self._call.close()
            if self._sink.is_open:
                self.unsure = ""
            self._end()
        return self.unsure

    def _end(self) -> None:
        if self._sink.is_open:
            self._sink.end()
        self._call = None

    def _next_call(self) -> str:
        """Begin the next call where one is to be seen; the text that belongs to it."""
        text = self._skip(self.unsure)
        if not text:
            return ""
        if text[0] == "{":
            self._call = _Object(self._sink, strict=self._strict)
            self.unsure = self.unsure[: len(self.unsure) - len(text)]
            return text
        if self._header is not None:
            at = text.find(self._header.end)
            if at < 0:
                self.failed = len(text) > _LONGEST_HEADER
                return ""
            at += len(self._header.end)
            found = self._header.pattern.fullmatch(text, 0, at)
            if found is not None:
                self._call = _Named(self._sink, found["name"])
                return text[at:]
        self.failed = _FENCE.fullmatch(text) is None
        return ""

    def _skip(self, text: str) -> str:
        """The text without what may stand between calls; nothing where that is not certain yet."""
        markers = self._header.skipped if self._header is not None else ()
        while text := text.lstrip():
            if any(len(text) < len(marker) and marker.startswith(text) for marker in markers):
                return ""
            marker = next((marker for marker in markers if text.startswith(marker)), "")
            skipped = len(marker) or _BETWEEN.match(text).end()  # type: ignore[union-attr]
            if not skipped:
                return text
            text = text[skipped:]
        return ""
