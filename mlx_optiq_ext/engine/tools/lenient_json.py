"""JSON as models write it, read piece by piece and written again as plain JSON while it comes.

Also takes single quotes, Python's constants, line breaks in strings, escapes that JSON does not know, and
trailing commas. Knows nothing of tool calls beyond the schemas of an object's properties.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from mlx_optiq_ext.engine.tools.schema import coerce, types_of

__all__ = ["LenientJson", "StringReader", "dump"]

_MOST_NESTED = 200
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[A-Za-z0-9+\-.]*")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'",
}  # fmt: skip
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{4})")
_PART_OF_UNICODE = re.compile(r"\\(u[0-9a-fA-F]{0,3})?")


def dump(value: Any) -> str:
    """The one form in which arguments are written."""
    return json.dumps(value, ensure_ascii=False)


class StringReader:
    """The characters of one quoted string, decoded as they come.

    Args:
        quote: Which quote ends it; the opening one is read already.
    """

    def __init__(self, quote: str) -> None:
        self.done = False
        self._quote = quote
        self._plain = re.compile(rf"[^\\{quote}]*")
        self._held = ""

    def feed(self, text: str) -> tuple[str, str]:
        """Read on.

        Returns:
            Characters of the string, and what of ``text`` comes after its end.
        """
        text, self._held, at, decoded = self._held + text, "", 0, []
        while at < len(text):
            plain = self._plain.match(text, at)
            assert plain is not None
            decoded.append(plain.group())
            at = plain.end()
            if at < len(text) and text[at] == self._quote:
                self.done = True
                return "".join(decoded), text[at + 1 :]
            if at < len(text):
                character, after = _unescape(text, at)
                if after == at:
                    self._held = text[at:]
                    break
                decoded.append(character)
                at = after
        return "".join(decoded), ""


class LenientJson:
    """One JSON value.

    Args:
        properties: Schemas of the properties of the outermost object; their values are brought to the types
            these name, where nothing is lost.
    """

    def __init__(self, properties: Mapping[str, Any] | None = None) -> None:
        self.done = False
        self.failed = False
        self.is_object = False
        """Whether it is an object; False until it began."""
        self._properties = properties or {}
        self._stack: list[str] = []
        self._counts: list[int] = []
        self._state = "value"
        self._key: list[str] = []
        self._lead = ""
        self._string: StringReader | None = None
        self._buffer: list[str] | None = None
        self._word = ""
        self._schema: Any = None
        self._out: list[str] = []
        self._began = False

    def take(self) -> str:
        """What can be written since the last call; all of it together is the value in :func:`dump`'s form."""
        out = "".join(self._out)
        self._out.clear()
        return out

    def feed(self, text: str) -> str:
        """Read on; what of ``text`` is not part of the value, because it is ``done`` or has ``failed``."""
        while text and not self.done and not self.failed:
            if self._state in ("string", "key"):
                text = self._in_string(text)
                continue
            if self._state == "word":
                text = self._in_word(text)
                continue
            text = text[_SPACE.match(text).end() :]  # type: ignore[union-attr]
            if text:
                used = self._at_token(text[0])
                text = text[used:]
        return text

    def close(self) -> None:
        """End of the text: close what is open; a key without a value and half a word are left out."""
        if self._state == "word":
            self._end_word()
        elif self._state == "string":
            self._end_string()
        self._out.extend("}" if opened == "{" else "]" for opened in reversed(self._stack))
        self._stack.clear()
        self.failed, self.done = not self._began, self._began

    def _at_token(self, character: str) -> int:
        """Begin or end something at a character that is no space; how many characters that used."""
        closes = self._stack and character == ("}" if self._stack[-1] == "{" else "]")
        if closes and self._state in ("next", "name", "value") and not self._key:
            self._stack.pop()
            self._counts.pop()
            self._out.append(character)
            self._value_ended()
        elif self._state == "value" and character not in ",:]}":
            return self._begin_value(character)
        elif self._state == "name" and character in "\"'":
            self._state, self._string = "key", StringReader(character)
        elif self._state == "colon" and character == ":":
            self._state = "value"
        elif self._state == "next" and character == ",":
            self._state = "name" if self._stack[-1] == "{" else "value"
        else:
            self.failed = True
            return 0
        return 1

    def _begin_value(self, character: str) -> int:
        at_top = len(self._stack) == 1 and self._stack[0] == "{"
        self._schema = self._properties.get("".join(self._key)) if at_top else None
        if self._stack:
            self._lead = ", " if self._counts[-1] else ""
            if self._stack[-1] == "{":
                self._lead += dump("".join(self._key)) + ": "
        self._key = []
        if character in "{[":
            self._open(character)
        elif character in "\"'":
            types = types_of(self._schema)
            self._state, self._string = "string", StringReader(character)
            self._buffer = [] if types and "string" not in types else None
            if self._buffer is None:
                self._write('"')
        else:
            self._state, self._word = "word", ""
            return 0
        return 1

    def _open(self, character: str) -> None:
        if len(self._stack) >= _MOST_NESTED:
            self.failed = True
            return
        self.is_object = self.is_object or (not self._stack and character == "{")
        self._write(character)
        self._stack.append(character)
        self._counts.append(0)
        self._state = "name" if character == "{" else "value"

    def _in_string(self, text: str) -> str:
        assert self._string is not None
        decoded, rest = self._string.feed(text)
        if self._state == "key":
            self._key.append(decoded)
            if self._string.done:
                # A key is never taken for "none yet", not even an empty one.
                self._key.append("")
                self._state = "colon"
        else:
            self._add_to_string(decoded)
            if self._string.done:
                self._end_string()
        return rest

    def _add_to_string(self, decoded: str) -> None:
        if self._buffer is not None:
            self._buffer.append(decoded)
        elif decoded:
            self._out.append(dump(decoded)[1:-1])

    def _end_string(self) -> None:
        if self._buffer is not None:
            self._write(dump(coerce("".join(self._buffer), self._schema)))
            self._buffer = None
        else:
            self._out.append('"')
        self._value_ended()

    def _in_word(self, text: str) -> str:
        matched = _WORD.match(text)
        assert matched is not None
        self._word += matched.group()
        if matched.end() < len(text):
            self._end_word()
        return text[matched.end() :]

    def _end_word(self) -> None:
        if self._word in _CONSTANTS:
            self._write(dump(_CONSTANTS[self._word]))
        elif _NUMBER.fullmatch(self._word) and len(self._word) < 400:
            value = float(self._word) if any(mark in self._word for mark in ".eE") else int(self._word)
            # JSON has no infinity, so a number too large for a float stays as it was written.
            self._write(self._word if abs(value) == float("inf") else dump(coerce(value, self._schema)))
        else:
            self.failed = True
            return
        self._value_ended()

    def _write(self, text: str) -> None:
        """The first text of an element, after what leads to it."""
        self._out.append(self._lead + text)
        self._lead, self._began = "", True
        if self._counts:
            self._counts[-1] += 1

    def _value_ended(self) -> None:
        self._state, self._string = "next", None
        self.done = not self._stack


def _unescape(text: str, at: int) -> tuple[str, int]:
    """The character of the escape at ``at`` and where it ends; the same place where more text is needed."""
    rest = text[at : at + 12]
    code = _UNICODE.match(rest)
    if code is None:
        if len(rest) < 2 or (len(rest) < 6 and _PART_OF_UNICODE.fullmatch(rest)):
            return "", at
        return _ESCAPES.get(rest[1], rest[:2]), at + 2
    value = int(code.group(1), 16)
    if not 0xD800 <= value < 0xE000:
        return chr(value), at + 6
    second = _UNICODE.match(rest, 6)
    if second is None:
        is_open = value < 0xDC00 and (len(rest) == 6 or _PART_OF_UNICODE.fullmatch(rest, 6))
        return ("", at) if is_open else ("\ufffd", at + 6)
    low = int(second.group(1), 16)
    if value < 0xDC00 <= low < 0xE000:
        return chr(0x10000 + ((value - 0xD800) << 10) + (low - 0xDC00)), at + 12
    return "\ufffd", at + 6
