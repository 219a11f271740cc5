"""Which units are forced to a choice, and why.

Knows paths and shapes, not divergences; the price of a pin is worked out in ``bitmap``.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.quant import Choice, Unit

__all__ = ["ForcedChoice", "PinRule", "edge_pins", "match_pins", "parse_pin"]


class PinRule(msgspec.Struct, frozen=True, kw_only=True):
    """One ``--pin PATTERN=CHOICE``."""

    pattern: str
    choice: Choice


class ForcedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A choice that replaces the allocator's own."""

    choice: Choice
    reason: str


def parse_pin(text: str) -> PinRule:
    """Read ``PATTERN=CHOICE``, such as ``model.layers.0.*=8g64`` or ``lm_head=keep``.

    Raises:
        UsageError: No ``=``, an empty pattern or no such choice.
    """
    pattern, separator, label = text.rpartition("=")
    if not separator or not pattern.strip():
        raise UsageError(f"--pin {text!r} is not PATTERN=CHOICE; write it like 'model.layers.0.*=8g64'")
    try:
        return PinRule(pattern=pattern.strip(), choice=Choice.parse(label))
    except UsageError as error:
        raise UsageError(f"--pin {text!r}: {error}") from None


def match_pins(rules: Sequence[PinRule], units: Sequence[Unit]) -> dict[str, ForcedChoice]:
    """Apply the rules in order; a later one replaces an earlier one on the same unit.

    A pattern is a shell glob over the whole dotted path (``*`` also crosses dots). Matching one path of a
    unit moves all of its paths.

    Returns:
        Unit path → forced choice.
    Raises:
        UsageError: A pattern matches nothing, or a choice does not fit a matched tensor.
    """
    forced: dict[str, ForcedChoice] = {}
    for rule in rules:
        matched = [unit for unit in units if any(fnmatchcase(path, rule.pattern) for path in unit.paths)]
        if not matched:
            raise UsageError(_no_match(rule.pattern, units))
        for unit in matched:
            # The published file form has no shapes; then only mlx can tell, when it quantizes.
            if unit.shape and not rule.choice.fits(unit.shape[-1]):
                raise UsageError(
                    f"--pin {rule.pattern}={rule.choice.label}: {unit.path} has {unit.shape[-1]} weights per "
                    f"row, not a multiple of {rule.choice.group_size}; use a smaller group or keep"
                )
            reason = f"--pin {rule.pattern}={rule.choice.label}"
            forced[unit.path] = ForcedChoice(choice=rule.choice, reason=reason)
    return forced


def edge_pins(units: Sequence[Unit], widest: Sequence[Choice]) -> dict[str, ForcedChoice]:
    """The published rule: embedding, head, first and last block at the widest candidate.

    Args:
        widest: Widest quantized choice of each unit, in the order of ``units``.
    Returns:
        Unit path → forced choice.
    """
    blocks = [unit.block for unit in units if unit.block is not None]
    ends = {min(blocks): "first block", max(blocks): "last block"} if blocks else {}
    forced: dict[str, ForcedChoice] = {}
    for unit, choice in zip(units, widest, strict=True):
        part: str = unit.kind if unit.kind in ("embedding", "head") else ""
        if unit.block is not None:
            part = part or ends.get(unit.block, "")
        if part:
            forced[unit.path] = ForcedChoice(choice=choice, reason=f"--protect edges: {part}")
    return forced


def _no_match(pattern: str, units: Sequence[Unit]) -> str:
    """Error text that names paths close to a pattern that matches none."""
    names = {path.rpartition(".")[2]: None for unit in units for path in unit.paths}
    wanted = pattern.rpartition(".")[2].strip("*")
    close = difflib.get_close_matches(wanted, list(names), n=2, cutoff=0.5) or list(names)[:2]
    found = [next(path for unit in units for path in unit.paths if path.endswith(name)) for name in close]
    return (
        f"--pin {pattern!r} matches no path (a glob covers the whole path); near it are "
        f"{' and '.join(found)}, matched by {' and '.join(repr('*' + name) for name in close)}"
    )
