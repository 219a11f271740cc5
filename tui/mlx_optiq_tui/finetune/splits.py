"""Split rows by seed and save them as the files that training reads.

Equal examples stay on one side. Files appear complete or not at all; a part that became empty is removed, for
training would read it.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_ext.formats.dataset import hold_out
from mlx_optiq_ext.formats.examples import Example
from mlx_optiq_tui.finetune.rows import Method, Row, example_of

__all__ = ["Split", "save_split", "split_rows"]


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Rows by part."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...] = ()
    test: tuple[Row, ...] = ()

    @property
    def words(self) -> str:
        """For people."""
        return f"{len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test"


def split_rows(
    rows: Sequence[Row], method: Method, *, valid_share: float, test_share: float, seed: int
) -> Split:
    """Hold out parts of the rows.

    Args:
        rows: All of them usable.
        method: By whose rules they are read.
        valid_share: Part for validation, of all rows.
        test_share: Part for the test, of all rows.
        seed: Decides which.
    Raises:
        UsageError: There is none, one is unusable (its line is named), or nothing is left to train on.
    """
    examples: list[Example] = []
    for index, row in enumerate(rows):
        example = example_of(row, method, str(index))
        if isinstance(example, str):
            raise UsageError(f"row {index + 1}: {example}")
        examples.append(example)
    if not examples:
        raise UsageError("there are no rows; add one (n) or import a file (i)")
    if not (valid_share >= 0 and test_share >= 0 and valid_share + test_share < 1):
        raise UsageError("shares must be 0 or more and leave something to train on")
    left, test = _held_out(tuple(examples), test_share, seed)
    train, valid = _held_out(left, valid_share / (1 - test_share), seed)
    return Split(
        train=tuple(rows[int(example.where)] for example in train),
        valid=tuple(rows[int(example.where)] for example in valid),
        test=tuple(rows[int(example.where)] for example in test),
    )


def save_split(folder: Path, split: Split) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl.

    Raises:
        ResourceError: A file cannot be written.
    """
    for name, rows in (("train", split.train), ("valid", split.valid), ("test", split.test)):
        file = folder / f"{name}.jsonl"
        if rows:
            write_bytes_atomic(file, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        else:
            file.unlink(missing_ok=True)


def _held_out(
    examples: tuple[Example, ...], share: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    return hold_out(examples, share, seed) if share > 0 else (examples, ())
