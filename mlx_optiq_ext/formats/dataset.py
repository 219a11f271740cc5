"""Rows of a data set for training: read from JSONL with their lines, hashed, split by seed.

What a row means is ``examples``' matter. Called by ``lora.dataset`` and by the dashboard's designer.
"""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.examples import Example, Preference

__all__ = ["Row", "content_hash", "hold_out", "read_rows"]

Row = tuple[str, object]
"""Where it stands, and its decoded JSON; an exception where the line is none."""


def read_rows(file: Path) -> list[Row]:
    """Rows of a JSONL file; a line that is no JSON is left to be reported with the others."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"--data {file} cannot be read: {error.strerror or error}") from error
    rows: list[Row] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            rows.append((where, msgspec.json.decode(line)))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            rows.append((where, error))
    return rows


def hold_out(
    examples: tuple[Example, ...], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split by seed; equal examples stay on one side, so that nothing held out was seen."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(content_hash(example), []).append(index)
    wanted = max(1, round(share * len(examples)))
    if len(groups) < 2:
        return examples, ()
    keys = list(groups)
    held: set[int] = set()
    for position in np.random.default_rng(seed).permutation(len(keys))[:-1]:
        if len(held) >= wanted:
            break
        held.update(groups[keys[position]])
    kept = tuple(example for index, example in enumerate(examples) if index not in held)
    return kept, tuple(examples[index] for index in sorted(held))


def content_hash(example: Example) -> str:
    """Hash of an example without the place that it was read from."""
    bare = replace(example, where="")
    if isinstance(bare, Preference):
        chosen, rejected = (replace(answer, where="") for answer in (bare.chosen, bare.rejected))
        bare = replace(bare, chosen=chosen, rejected=rejected)
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()
