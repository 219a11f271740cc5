"""Prompt text to token ids, such that only the template writes control tokens.

What a client sent is marked before the template sees it: a break, which no text contains, is put into every
control token that is spelled out in it. The breaks go when the text is encoded. Knows no messages.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any

__all__ = ["ControlTokens", "encode_marked", "encode_prompt", "encode_text"]

_BREAK = "\ufdd0"
"""A code point that Unicode keeps for such use, never for text."""
_FAR = 64
"""Characters behind a control token that are worth a boundary of their own."""


class ControlTokens:
    """The tokens of a tokenizer that mean something to the model beyond their letters.

    Added tokens that are special, that the template writes, or that mark reasoning or calls; others, such as
    runs of spaces that some tokenizers add, are text.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        template: Text of the chat template.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._own = frozenset(
            marker
            for marker in (
                tokenizer.think_start,
                tokenizer.think_end,
                tokenizer.tool_call_start,
                tokenizer.tool_call_end,
            )
            if marker
        )
        self._literals: set[str] = set()
        self._greedy: set[str] = set()
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values():
            text = token.content
            if len(text.strip()) > 1 and (token.special or text in template or text in self._own):
                self._literals.add(text)
                if token.lstrip:
                    self._greedy.add(text)
        self._lengths = sorted({len(text) for text in self._literals})
        first = "".join(sorted({text[0] for text in self._literals}))
        self._first = re.compile(f"[{re.escape(first)}]" if first else r"(?!)")

    def mark(self, value: Any, *, by_model: bool = False) -> Any:
        """A JSON value with a break in every control token that its strings spell.

        Args:
            value: What a client sent.
            by_model: Whether the model wrote it: then its marks of reasoning and calls stay what they are.
        """
        if isinstance(value, str):
            return self._marked(value, self._own if by_model else frozenset())
        if isinstance(value, dict):
            return {self.mark(key): self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, list | tuple) else value

    def starts(self, text: str) -> list[int]:
        """Where control tokens begin at which a text can be cut without changing its tokens."""
        return [at for at, literal in self._find(text) if literal not in self._greedy]

    def _marked(self, text: str, kept: frozenset[str]) -> str:
        text = text.replace(_BREAK, "\ufffd")
        edges = [at + 1 for at, literal in self._find(text) if literal not in kept]
        return _BREAK.join(text[a:b] for a, b in pairwise([0, *edges, len(text)])) if edges else text

    def _find(self, text: str) -> Iterator[tuple[int, str]]:
        for first in self._first.finditer(text):
            at = first.start()
            for length in self._lengths:
                if text[at : at + length] in self._literals:
                    yield at, text[at : at + length]
                    break


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text as it is."""
    # transformers warns of every text above model_max_length unless it is told not to; the engine refuses it.
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, **quiet))


def encode_marked(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text with breaks; the same as without them wherever it has none."""
    first, *others = text.split(_BREAK)
    tokens = encode_text(tokenizer, first, add_special_tokens=add_special_tokens)
    for piece in others:
        tokens += encode_text(tokenizer, piece)
    return tokens


def encode_prompt(
    tokenizer: Any, text: str, starts: Sequence[int], marks: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a rendered prompt, and which of them another prompt shares.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        text: With breaks.
        starts: Where control tokens begin in it, ascending.
        marks: Places up to which another prompt has the same text.
    Returns:
        All tokens; ascending numbers of them, between none and all, that such a prompt begins with too.
    """
    # At the start of a control token a text can be cut, and its parts have the tokens of the whole.
    cuts = {mark: starts[place - 1] if (place := bisect_right(starts, mark)) else 0 for mark in marks}
    tokens: list[int] = []
    counts: dict[int, int] = {}
    for start, end in pairwise(sorted({0, *cuts.values(), len(text)})):
        counts[start] = len(tokens)
        tokens += encode_marked(tokenizer, text[start:end])
    boundaries = set(counts.values())
    for mark, cut in cuts.items():
        if mark - cut > _FAR:
            # Within a text the last tokens may depend on what comes next, so only equal ones count.
            near = encode_marked(tokenizer, text[cut:mark])
            rest = tokens[counts[cut] :]
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(near, rest, strict=False)))
            boundaries.add(counts[cut] + same)
    return tokens, sorted(count for count in boundaries if 0 < count < len(tokens))
