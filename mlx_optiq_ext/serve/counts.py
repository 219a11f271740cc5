"""Bounds of the numbers of tokens that a client may send: what 32 bits hold, as MLX counts.

A number within them may still be more than the model's context, which then ends the answer.
"""

from typing import Annotated, TypeAlias

from msgspec import Meta

__all__ = ["MOST_TOKENS", "TokenCount", "TopK"]

MOST_TOKENS = 2**31 - 1

TokenCount: TypeAlias = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
TopK: TypeAlias = Annotated[int, Meta(ge=-1, le=MOST_TOKENS)]
"""0 and -1 take every token."""
