"""The visible part of an answer: stop strings, and the line breaks around it that belong to no one.

Knows text only, neither tokens nor calls. Used by ``decode``.
"""

from collections.abc import Sequence
from typing import Literal

from mlx_optiq_ext.engine.tools.reader import overlap

__all__ = ["VisibleText"]


class VisibleText:
    """Lets text through as soon as it is certain.

    Args:
        stops: Strings that end the answer and are not part of it.
        calls: Whether calls may come: then line breaks wait, since those before a call are not shown.
    """

    def __init__(self, stops: Sequence[str], *, calls: bool) -> None:
        self.stop: str | None = None
        """The stop string that was met."""
        self._stops = tuple(stop for stop in stops if stop)
        self._calls = calls
        self._lead: Literal["", "hold", "breaks", "space"] = "hold" if calls else ""
        self._waiting = ""
        self._breaks = ""

    @property
    def held(self) -> int:
        """Number of characters that wait."""
        return len(self._waiting) + len(self._breaks)

    def after_reasoning(self) -> None:
        """Drop the line breaks that come next."""
        if self._lead == "hold":
            self._waiting = ""
        self._lead = "breaks"

    def feed(self, text: str) -> str:
        """Read on; what can be shown."""
        if self.stop is not None:
            return ""
        text = self._without_lead(text)
        return self._without_last_breaks(self._until_stop(text)) if text else ""

    def before_call(self) -> str:
        """A call comes next: what waits, without line breaks; space after the call is dropped too."""
        waiting = self._breaks + self._waiting
        self._waiting = self._breaks = ""
        self._lead = "space"
        return waiting.rstrip("\r\n") if self.stop is None else ""

    def flush(self) -> str:
        """The answer is over: what waits."""
        waiting = self._breaks + self._waiting
        self._waiting = self._breaks = ""
        return waiting if self.stop is None else ""

    def _without_lead(self, text: str) -> str:
        if not self._lead:
            return text
        if self._lead == "hold":
            text, self._waiting = self._waiting + text, ""
            if not text.strip():
                self._waiting = text
                return ""
        else:
            text = text.lstrip() if self._lead == "space" else text.lstrip("\r\n")
        if text:
            self._lead = ""
        return text

    def _until_stop(self, text: str) -> str:
        if not self._stops:
            return text
        text, self._waiting = self._waiting + text, ""
        met = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            at, self.stop = min(met)
            self._waiting = text[at:]
            return text[:at]
        wait = max(overlap(text, stop) for stop in self._stops)
        self._waiting = text[len(text) - wait :]
        return text[: len(text) - wait]

    def _without_last_breaks(self, text: str) -> str:
        if not self._calls or self.stop is not None:
            text, self._breaks = self._breaks + text, ""
            return text
        text = self._breaks + text
        shown = text.rstrip("\r\n")
        self._breaks = text[len(shown) :]
        return shown
