"""What all readers of call syntaxes are: text goes in as it is generated, calls reach the sink.

Knows no syntax; ``block`` picks one of the implementations beside this module.
"""

from typing import Protocol

__all__ = ["CallReader", "overlap"]


class CallReader(Protocol):
    """Reads the text between the markers of a block of calls."""

    def feed(self, text: str) -> None:
        """Read on, and tell the sink what is certain."""

    def close(self) -> str:
        """The text is over: end an open call; what of the text belongs to no call."""


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may begin ``marker`` without being all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
