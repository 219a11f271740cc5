"""How a call's name is written before the JSON of its arguments, in the syntaxes that do so.

Source: mlx-lm's parsers of the same names.
"""

import re

__all__ = ["HEADERS", "Header"]


class Header:
    """A name written before the JSON of its arguments.

    Args:
        pattern: All of it, with a group ``name``.
        end: The marker that it ends with.
        skipped: Markers around calls that mean nothing by themselves.
    """

    def __init__(self, pattern: str, end: str, *skipped: str) -> None:
        self.pattern = re.compile(pattern)
        self.end = end
        self.skipped = skipped


HEADERS = {
    "mistral": Header(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?\[ARGS\]", "[ARGS]", "[TOOL_CALLS]"),
    "kimi_k2": Header(
        r"\s*(?:functions\.)?(?P<name>[^\s<>]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
    ),
}
"""By the name of mlx-lm's parser module."""
