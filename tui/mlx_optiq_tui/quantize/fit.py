"""What fits this machine: weights at several widths, the KV cache of a context, and what is left.

Knows sizes and no model. Called by the quantize screen.
"""

import os
from bisect import bisect_left

import msgspec

from mlx_optiq_ext.allocate.size import head_room_nbytes
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.quant import Choice
from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_tui.quantize.model_facts import ModelFacts

__all__ = ["Fit", "fit_of", "fit_table", "machine_memory_nbytes"]

_WIDTHS = (8, 6, 5, 4, 3)
_UNBOUNDED = 1 << 24
"""More tokens than anyone asks for."""


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """One way to store a model, in one machine's memory."""

    label: str
    bpw: float
    weights_nbytes: int
    cache_nbytes: int | None
    """KV cache at the context that was asked for; None where the config does not tell."""
    room_nbytes: int
    """For activations and the system."""
    memory_nbytes: int
    longest_context: int | None
    """Tokens whose cache still fits, as far as the model was made for; 0 where the weights alone do not."""

    @property
    def context_words(self) -> str:
        """The longest context."""
        if self.longest_context is None:
            return "–"
        return "any" if self.longest_context >= _UNBOUNDED else f"{self.longest_context:,}"

    @property
    def needed_nbytes(self) -> int:
        """All of it."""
        return self.weights_nbytes + (self.cache_nbytes or 0) + self.room_nbytes

    @property
    def fits(self) -> bool:
        """Whether the machine has as much."""
        return self.needed_nbytes <= self.memory_nbytes


def machine_memory_nbytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fit_of(facts: ModelFacts, label: str, bpw: float, *, memory_nbytes: int, context: int) -> Fit:
    """What a model takes at a number of stored bits per weight.

    Args:
        facts: With a known number of weights.
        label: For people.
        bpw: Everything stored, over all weights.
        memory_nbytes: Of the machine.
        context: Tokens in the cache, at least 1.
    """
    weights = int(facts.numel * bpw / 8)
    room = head_room_nbytes(memory_nbytes)
    left = max(memory_nbytes - weights - room, 0)
    return Fit(
        label=label,
        bpw=bpw,
        weights_nbytes=weights,
        cache_nbytes=facts.cache_nbytes(context),
        room_nbytes=room,
        memory_nbytes=memory_nbytes,
        longest_context=_longest(facts, left),
    )


def _longest(facts: ModelFacts, left: int) -> int | None:
    """Tokens whose cache takes at most ``left`` bytes: sliding windows make later ones cheaper."""
    if facts.cache_nbytes(1) is None:
        return None
    most = facts.context or _UNBOUNDED
    # The key turns at the first context whose cache is too large.
    return bisect_left(range(1, most + 1), True, key=lambda tokens: (facts.cache_nbytes(tokens) or 0) > left)


def fit_table(facts: ModelFacts, *, memory_nbytes: int, context: int) -> TextTable | None:
    """The model as it is and at uniform widths; None where its number of weights is not known."""
    if not facts.numel:
        return None
    ways = [("as it is", float(facts.float_bits))]
    ways += [(f"{bits} bits", Choice(bits=bits, group_size=64).bpw(facts.float_bits)) for bits in _WIDTHS]
    fits = [fit_of(facts, label, bpw, memory_nbytes=memory_nbytes, context=context) for label, bpw in ways]
    return TextTable(
        title=f"In {format_nbytes(memory_nbytes)} of memory, with {context:,} tokens of context",
        columns=("stored", "bits/weight", "weights", "KV cache", "fits", "longest context"),
        rows=tuple(_cells(fit) for fit in fits),
        note=f"{format_nbytes(fits[0].room_nbytes)} are left for activations and the system.",
    )


def _cells(fit: Fit) -> tuple[str, ...]:
    return (
        fit.label,
        f"{fit.bpw:.2f}",
        format_nbytes(fit.weights_nbytes),
        "–" if fit.cache_nbytes is None else format_nbytes(fit.cache_nbytes),
        "✓ yes" if fit.fits else "✗ no",
        fit.context_words,
    )
