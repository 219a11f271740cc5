"""Rules of one grammar while they are being collected, in llguidance's dialect of Lark.

Knows how text, markers, JSON and "anything up to here" are written. Called by the syntaxes beside it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ANYTHING", "Grammar", "one_of", "searched"]

ANYTHING = r"/(?s:.*)/"
"""Any text without markers."""
_WHITESPACE = r"[ \n]{1,32}"
"""Between tokens of JSON: bounded, for a model that likes spaces must not go on with them for ever."""
_LARGEST = 9 * 10**18
"""Of integers without bounds of their own, for the same reason; what 64 bits hold, within a rounding."""
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
_DATA = {"enum", "const", "default", "examples"}
"""Keywords whose values are no schemas."""


class Grammar:
    """Lark rules with generated names.

    Args:
        markers: Tokens that stand for themselves, by their text; in a literal they are drawn as that token.
    """

    def __init__(self, markers: Mapping[str, int]) -> None:
        self._markers = markers
        by_length = sorted(markers, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        self._rules: list[str] = []

    def literal(self, text: str) -> str:
        """Exactly this text."""
        parts: list[str] = []
        at = 0
        for match in self._split.finditer(text):
            if match.start() > at:
                parts.append(quoted(text[at : match.start()]))
            parts.append(f"<[{self._markers[match[0]]}]>")
            at = match.end()
        if at < len(text):
            parts.append(quoted(text[at:]))
        return " ".join(parts)

    def rule(self, body: str, attributes: str = "") -> str:
        """Name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """Name of a new terminal: a text that regular expressions describe."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def reserve(self) -> str:
        """Name of a rule whose body comes later, by :meth:`define`: for rules that contain themselves."""
        self._rules.append("")
        return f"r{len(self._rules) - 1}"

    def define(self, name: str, body: str) -> None:
        """Give a reserved rule its body."""
        self._rules[int(name[1:])] = f"{name}: {body}"

    def json(self, schema: Any, **options: Any) -> str:
        """A JSON value of a schema.

        Args:
            schema: JSON schema.
            options: llguidance's compile options beside those that are always set.
        """
        schema = {} if schema is True else _bounded(schema)
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, **options}}
        return self.rule(f"%json {json.dumps(schema)}")

    def text_until(self, end: str, terminal: str = ANYTHING) -> str:
        """Text of a terminal, then ``end``; where that is spelled in letters the text cannot contain it.

        Args:
            end: What follows.
            terminal: Lark expression of terminals for the text.
        """
        marker = self._split.search(end)
        if marker is not None and marker.start() == 0:
            return f"{self.terminal(terminal)} {self.literal(end)}"
        at = marker.start() if marker is not None else len(end)
        lazy = self.rule(
            f"{terminal} & ~/(?s:.*){escaped(end[:at].strip())}(?s:.*)/", f"[suffix={quoted(end[:at])}]"
        )
        return f"{lazy} {self.literal(end[at:])}".rstrip()

    def text(self, start: str) -> str:
        """The whole grammar.

        Args:
            start: What the answer is.
        """
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"


def _bounded(schema: Any) -> Any:
    """A schema whose integers have an end."""
    if isinstance(schema, list):
        return [_bounded(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: value if name in _DATA else _bounded(value) for name, value in schema.items()}
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if "integer" in kinds and "number" not in kinds and not _BOUNDS & set(schema):
        inner |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return inner


def one_of(options: Sequence[str]) -> str:
    """One of these expressions."""
    return options[0] if len(options) == 1 else f"({' | '.join(options)})"


def quoted(text: str) -> str:
    """Text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """Text within a Lark regular expression."""
    return re.sub(r"[\\.+*?()|\[\]{}^$/&~-]", r"\\\g<0>", text).replace("\n", "\\n")


def searched(pattern: str) -> str:
    """Terminal of texts in which a pattern is found, as JSON schemas mean it.

    Args:
        pattern: Regular expression; ``^`` and ``$`` at its ends bind it to those of the text.
    """
    head = "" if pattern.startswith("^") else "(?s:.*)"
    is_bound = pattern.endswith("$") and not pattern.endswith("\\$")
    core = pattern.removeprefix("^")
    core = core[:-1] if is_bound else core
    slashed = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", core).replace("\n", "\\n")
    return f"/{head}(?:{slashed}){'' if is_bound else '(?s:.*)'}/"
