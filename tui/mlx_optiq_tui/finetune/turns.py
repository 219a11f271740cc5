"""A conversation as text that people write: a heading for each role, what was said below it.

    ## user
    Where is the tower?
    ## assistant
    In Paris.

Knows roles and headings, no file and no widget. Used by the editor and by imports of Markdown.
"""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["is_plain", "text_of_turns", "turns_of_text"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_HEADING = re.compile(rf"^#{{1,6}}\s*({'|'.join(_ROLES)})\s*:?\s*$", re.IGNORECASE)


def turns_of_text(text: str) -> list[dict[str, Any]]:
    """Messages of a text with headings; empty where no heading names a role.

    What stands before the first heading is left out where it is blank, else it is the system's.
    """
    turns: list[dict[str, Any]] = []
    lines: list[str] = []
    role = "system"
    for line in [*text.splitlines(), None]:
        heading = _HEADING.match(line) if line is not None else None
        if line is not None and heading is None:
            lines.append(line)
            continue
        content = "\n".join(lines).strip()
        if content or turns or role != "system":
            turns.append({"role": role, "content": content})
        if heading is None:
            break
        role, lines = heading[1].lower(), []
    return turns if any(_HEADING.match(line) for line in text.splitlines()) else []


def text_of_turns(turns: Sequence[dict[str, Any]]) -> str:
    """The text that :func:`turns_of_text` reads back."""
    return "\n\n".join(f"## {turn['role']}\n{turn.get('content') or ''}" for turn in turns)


def is_plain(turns: object) -> bool:
    """Whether headings and text say all that messages hold: no tool calls, no heading within a content."""
    if not isinstance(turns, list) or not turns:
        return False
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or not turn.keys() <= {"role", "content"}
            or turn.get("role") not in _ROLES
        ):
            return False
        content = turn.get("content")
        if not isinstance(content, str) or any(_HEADING.match(line) for line in content.splitlines()):
            return False
    return True
