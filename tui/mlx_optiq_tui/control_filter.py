"""Keep foreign text from steering the terminal: a filter of all that is drawn.

Log lines, names, search results and answers come from elsewhere, and Textual writes control characters of
a text as they are. Called by the app for every line of every screen.

Source: ECMA-48 (C0 and C1 sets); Unicode Standard Annex #9 (explicit directional formatting).
"""

import re
from collections.abc import Sequence

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

__all__ = ["ControlFilter", "without_controls"]

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    """A text without control characters (tabs and line feeds stay) and without directional overrides."""
    return _CONTROLS.sub("", text)


class ControlFilter(LineFilter):
    """Takes control characters out of what widgets draw; Textual's own control segments pass."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:  # noqa: ARG002 - as textual calls it
        """The same segments, cleaned.

        Args:
            segments: A line.
            background: Not looked at.
        """
        if not _has_controls(segments):
            return segments
        return [
            each if each.control else Segment(without_controls(each.text), each.style) for each in segments
        ]


def _has_controls(segments: Sequence[Segment]) -> bool:
    return any(not each.control and _CONTROLS.search(each.text) for each in segments)
