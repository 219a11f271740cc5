"""A data set for training, from JSONL files or the Hub, checked whole before anything is trained.

Knows files, splits and what to say of broken lines; what a row means is ``examples``' matter. Called by
``train``.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.dataset import Row, content_hash, hold_out, read_rows
from mlx_optiq_ext.formats.examples import FORMS, Example, parse_preference, parse_sft
from mlx_optiq_ext.hub.dataset import fetch_dataset
from mlx_optiq_ext.types.progress import Progress, ProgressSink, ignore_progress

__all__ = ["Dataset", "load_dataset"]

_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_SHOWN_PROBLEMS = 10


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """Examples of one form, split."""

    source: str
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    sha256: str
    """Of the contents of train and valid in their order."""
    notes: tuple[str, ...] = ()


def load_dataset(
    source: str,
    method: Literal["sft", "dpo"],
    *,
    validation_share: float = 0.05,
    seed: int = 0,
    progress: ProgressSink = ignore_progress,
) -> Dataset:
    """Read and check a whole data set.

    Args:
        source: A folder with train.jsonl and perhaps valid.jsonl and test.jsonl, one JSONL file, or the Hub
            id of a data set.
        method: Which forms are accepted.
        validation_share: Part of the examples held out where there is no validation file.
        seed: Decides which are.
        progress: Told about a download.
    Returns:
        At least one training example; notes say what was split off and what stands in both parts.
    Raises:
        UsageError: Nothing there, no training file, or broken rows: the first ten with file and line.
        ModelNotFound: The Hub has no such data set.
    """
    parse: Callable[[object, str], Example | str] = parse_sft if method == "sft" else parse_preference
    splits: dict[str, tuple[Example, ...]] = {}
    problems: list[str] = []
    for name, rows in _read(source, progress).items():
        splits[name] = tuple(_parsed(rows, parse, problems))
    if problems:
        raise UsageError(_listing(source, problems, FORMS[method]))
    train = splits.get("train", ())
    if not train:
        raise UsageError(f"{source} has no training examples; write one JSON object a line: {FORMS[method]}")
    valid, notes = splits.get("valid", ()), []
    if not valid and validation_share > 0:
        train, valid = hold_out(train, validation_share, seed)
        if valid:
            notes.append(f"{len(valid)} of {len(train) + len(valid)} examples are held out for validation")
    hashes = [[content_hash(example) for example in part] for part in (train, valid)]
    known = set(hashes[0])
    repeated = sum(digest in known for digest in hashes[1])
    if repeated:
        notes.append(f"{repeated} of {len(valid)} validation examples are in the training data too")
    digest = hashlib.sha256("\n".join((*hashes[0], "", *hashes[1])).encode()).hexdigest()
    return Dataset(
        source=source,
        train=train,
        valid=valid,
        test=splits.get("test", ()),
        sha256=digest,
        notes=tuple(notes),
    )


def _read(source: str, progress: ProgressSink) -> dict[str, list[Row]]:
    """Rows of every split that the source has."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = {
            split: file
            for split, names in _NAMES.items()
            if (file := next((path / f"{n}.jsonl" for n in names if (path / f"{n}.jsonl").is_file()), None))
        }
        if "train" not in files:
            raise UsageError(
                f"--data {source} has no train.jsonl; name the file itself if it is called otherwise"
            )
        return {split: read_rows(file) for split, file in files.items()}
    if path.is_file():
        return {"train": read_rows(path)}
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or source.endswith(".jsonl"):
        raise UsageError(f"--data {source}: no such file or folder, and no Hub id (ORGANISATION/NAME)")
    progress(Progress(stage="download", done=0, total=1, detail=source))
    found = fetch_dataset(source, _NAMES)
    progress(Progress(stage="download", done=1, total=1, detail=source))
    return {
        split: [row for part in parts for row in (read_rows(part) if isinstance(part, Path) else part)]
        for split, parts in found.items()
    }


def _parsed(
    rows: Iterable[Row], parse: Callable[[object, str], Example | str], problems: list[str]
) -> Iterable[Example]:
    """Examples of the rows that are right; what is wrong with the others is added to ``problems``."""
    for where, row in rows:
        parsed = f"not JSON ({row})" if isinstance(row, Exception) else parse(row, where)
        if isinstance(parsed, str):
            problems.append(f"{where}: {parsed}")
        else:
            yield parsed


def _listing(source: str, problems: Sequence[str], forms: str) -> str:
    """All that is wrong, the first of it in full."""
    rest = len(problems) - _SHOWN_PROBLEMS
    lines = [*problems[:_SHOWN_PROBLEMS], *([f"… and {rest} more"] if rest > 0 else [])]
    count = f"{len(problems)} unusable row{'s' if len(problems) > 1 else ''}"
    return "\n  ".join((f"{source} has {count}; accepted are {forms}:", *lines))
