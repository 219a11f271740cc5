"""An answer that is nothing but a call, without the markers that the model should have written around it.

Holds text back only as long as it can still be one. Used by ``decode`` where tools were given.
"""

from mlx_optiq_ext.engine.tools.json_calls import JsonCalls
from mlx_optiq_ext.engine.tools.sink import CallSink

__all__ = ["BareCalls"]

_OPENERS = "{[`"
_NOISE = " \t\r\n[],;`"


class BareCalls:
    """Looks at the beginning of the visible answer.

    Args:
        sink: Where calls go.
    """

    def __init__(self, sink: CallSink) -> None:
        self._sink = sink
        self._space = ""
        self._reader: JsonCalls | None = None
        self._is_off = False
        self._first = sink.num_calls

    @property
    def held(self) -> int:
        """Number of characters that wait."""
        return len(self._space) + (len(self._reader.unsure) if self._reader is not None else 0)

    def feed(self, text: str) -> str:
        """Read on; the text that is certainly no call."""
        if self._is_off:
            return text
        if self._reader is None:
            text, self._space = self._space + text, ""
            start = text.lstrip()
            if not start:
                self._space = text
                return ""
            if start[0] not in _OPENERS:
                self._is_off = True
                return text
            self._space, text = text[: len(text) - len(start)], start
            self._reader = JsonCalls(self._sink, strict=True)
        self._reader.feed(text)
        return self.close() if self._reader.failed else ""

    def close(self, *, is_whole: bool = True) -> str:
        """No call can begin any more: end an open one; the text that waits and is none.

        Args:
            is_whole: Whether the answer was not cut: where it was, an open call gets no end.
        """
        self._is_off = True
        if self._sink.is_open and not is_whole:
            self._sink.cut()
            self._space, self._reader = "", None
            return ""
        rest = self._reader.close() if self._reader is not None else ""
        space, self._space, self._reader = self._space, "", None
        if self._sink.num_calls == self._first:
            return space + rest
        return rest if rest.strip(_NOISE) else ""
