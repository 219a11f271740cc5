"""Where a row is in its reasoning, and how long that may go on.

Counts tokens; knows nothing of models, masks or threads. Used by ``steer``.
"""

from typing import Literal

from mlx_optiq_ext.types.chat import ReasoningOptions

__all__ = ["BUDGETS", "ReasoningTrack", "budget_of", "matched"]

BUDGETS: dict[str, int | None] = {
    "minimal": 0,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": None,
}
"""Reasoning tokens per effort; None: as long as the model wants."""


def budget_of(options: ReasoningOptions) -> int | None:
    """Reasoning tokens that a request allows: what it says, else what its effort stands for."""
    if options.budget is not None:
        return max(0, options.budget)
    return BUDGETS[options.effort] if options.effort is not None else None


class ReasoningTrack:
    """Follows the tokens of one answer from before its reasoning, through it, to what comes after.

    Args:
        start: Tokens that open reasoning; empty where the family has none.
        end: Tokens that close it.
        is_open: The prompt ends within reasoning.
        budget: Tokens between the two; None: any number.
    """

    def __init__(
        self, start: tuple[int, ...], end: tuple[int, ...], *, is_open: bool, budget: int | None
    ) -> None:
        self._start, self._end, self._budget = start, end, budget
        self.state: Literal["before", "inside", "after"] = "after"
        if end:
            self.state = "inside" if is_open else "before" if start else "after"
        self.num_tokens = 0
        """Drawn since reasoning began, its end included."""
        self._matched = 0
        """Tokens of the marker that is awaited, seen just now."""

    @property
    def left(self) -> int | None:
        """Tokens that may be drawn before this has a say: the budget, and the opening before it."""
        if self.state == "after" or self._budget is None:
            return None
        opening = len(self._start) - self._matched if self.state == "before" else 0
        return max(0, opening + self._budget - self.num_tokens)

    @property
    def opening(self) -> int | None:
        """The token that would open reasoning, or go on opening it."""
        return self._start[self._matched] if self.state == "before" else None

    @property
    def forced(self) -> int | None:
        """The token that must come next since the budget is used up."""
        if self.state != "inside" or self._budget is None or self.num_tokens < self._budget:
            return None
        return self._end[self._matched]

    def feed(self, token: int) -> None:
        """Follow one token of the answer."""
        if self.state == "before":
            if token != self._start[self._matched]:
                self.state = "after"
                return
            self._matched += 1
            if self._matched == len(self._start):
                self.state, self._matched = "inside", 0
        elif self.state == "inside":
            self._matched = matched(self._end, self._matched, token)
            if self._matched == len(self._end):
                self.state = "after"
            self.num_tokens += 1


def matched(marker: tuple[int, ...], before: int, token: int) -> int:
    """How many tokens of a marker the text ends with, one token later.

    Args:
        before: The same without that token; less than all of the marker.
    """
    text = (*marker[:before], token)
    return next(k for k in range(min(len(text), len(marker)), -1, -1) if text[len(text) - k :] == marker[:k])
