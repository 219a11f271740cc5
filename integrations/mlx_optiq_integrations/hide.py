"""Leave the values of keys and tokens out of text for a screen: the server's, and the user's own.

Knows no client: a value is left out for the name before it. Called for every diff.
"""

import re

from mlx_optiq_integrations.facts import NO_KEY

__all__ = ["hide_blocks", "hide_keys"]

_NAME = r"""(?:(?<!env_)key|token|secret|password|authorization)["']?[ \t]*[:=][ \t]*"""
_SECRET = re.compile(
    # A name that ends so, but not one of a variable that holds a key (``env_key``) ...
    rf"""({_NAME})"""
    # ... and a quoted value, or all that follows; not a table, nor what stands for no key.
    rf"""(?!["']?{re.escape(NO_KEY)}\b)("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^\s{{\["'][^\n]*)""",
    re.IGNORECASE,
)


def hide_keys(text: str) -> str:
    """The text with ``<hidden>`` in place of every value whose name says that it is a secret."""
    return _SECRET.sub(r"\1<hidden>", text)


_NAMED = re.compile(rf"(?P<head>.*?{_NAME})(?P<value>.*)", re.IGNORECASE)
_BLOCK = re.compile(r"[|>][-+0-9]*[ \t]*(?:#.*)?")
_HIDDEN = "<hidden>"


def hide_blocks(text: str) -> str:
    """The text with ``<hidden>`` in place of every line of a secret that goes on below its name.

    YAML's block, plain and quoted scalars and TOML's multi-line strings; the number of lines stays. A file is
    cleaned so before a diff is taken of it, which may show the middle of a value without its name.

    Args:
        text: A whole file.
    """
    lines = text.split("\n")
    place = 0
    while place < len(lines):
        found = _NAMED.fullmatch(lines[place])
        place += 1
        if found is None:
            continue
        end = _end_of_value(lines, place, found["value"].strip(), found["head"])
        if end > place:
            lines[place - 1] = f"{found['head']}{_HIDDEN}"
            lines[place:end] = [f"{line[: _indent(line)]}{_HIDDEN}" for line in lines[place:end]]
        place = end
    return "\n".join(lines)


def _end_of_value(lines: list[str], start: int, value: str, head: str) -> int:
    """Index behind the last line that a value reaches, where the line of its name is ``start - 1``."""
    for quote in ('"""', "'''", '"', "'"):
        if value.startswith(quote):
            rest = value[len(quote) :]
            if _closes(rest, quote):
                return start
            closing = (n for n in range(start, len(lines)) if _closes(lines[n], quote))
            return next(closing, len(lines) - 1) + 1
    is_scalar = not value.startswith(("{", "[", "#")) and ":" in head[-3:]
    if not is_scalar:
        return start
    end, depth = start, _indent(head)
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > depth):
        if not value and re.match(r"\s*(- |[\w\"'.-]+\s*:(\s|$))", lines[end]):
            return start
        end += 1
    return end if _BLOCK.fullmatch(value) or any(line.strip() for line in lines[start:end]) else start


def _closes(text: str, quote: str) -> bool:
    return quote in (re.sub(r"\\.", "", text) if quote[0] == '"' else text)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
