"""Bring a data set from the Hub: its JSONL files, or its rows through the optional ``datasets`` library.

Knows which file belongs to which split by its name, and nothing of what is in a row. Called by ``lora``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.hub.explain import HUB_ERRORS, explain_hub_error, is_unreachable
from mlx_optiq_ext.hub.fetch import hidden_bars

__all__ = ["Part", "fetch_dataset"]

Part: TypeAlias = Path | list[tuple[str, object]]
"""A JSONL file, or rows with the place that each has in the data set."""

_TIMEOUT_S = 15.0


def fetch_dataset(repo_id: str, names: Mapping[str, Sequence[str]]) -> dict[str, list[Part]]:
    """Download a data set.

    Args:
        repo_id: ``ORGANISATION/NAME``.
        names: Split → what repositories call it.
    Returns:
        Split → its parts, in the order of their names; splits that it lacks are left out.
    Raises:
        ModelNotFound: No such data set, no access, or no connection and no copy in the cache.
        UsageError: It has no JSONL files with the name of a split, and ``datasets`` is not installed.
    """
    try:
        found = _download(repo_id, names)
    except HUB_ERRORS as error:
        cached = _find_cached(repo_id) if is_unreachable(error) else None
        if cached is None:
            raise explain_hub_error(error, repo_id, None, kind="a data set") from error
        files = [path.relative_to(cached).as_posix() for path in cached.rglob("*.jsonl")]
        found = {
            split: [cached / file for file in chosen] for split, chosen in split_files(files, names).items()
        }
    if found:
        return {split: list(parts) for split, parts in found.items()}
    return {
        split: [rows]
        for split, wanted in names.items()
        if (rows := next(_rows_of(repo_id, wanted), None)) is not None
    }


def split_files(files: Sequence[str], names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """JSONL files by split: a word of the file's name, or its folder, is a name of the split.

    Args:
        files: Paths inside the repository.
        names: Split → what repositories call it.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        path = Path(file)
        words = {*re.split(r"[^a-z]+", path.stem.lower()), path.parent.name.lower()}
        split = next((split for split, known in names.items() if words.intersection(known)), None)
        if split is not None and path.suffix == ".jsonl":
            found.setdefault(split, []).append(file)
    return found


def _download(repo_id: str, names: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    info = HfApi().dataset_info(repo_id, timeout=_TIMEOUT_S)
    files = [entry.rfilename for entry in info.siblings or []]
    with hidden_bars():
        return {
            split: [
                Path(hf_hub_download(repo_id, file, repo_type="dataset", revision=info.sha))
                for file in chosen
            ]
            for split, chosen in split_files(files, names).items()
        }


def _find_cached(repo_id: str) -> Path | None:
    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", local_files_only=True))
    except HUB_ERRORS:
        return None


def _rows_of(repo_id: str, wanted: Sequence[str]) -> Iterator[list[tuple[str, object]]]:
    """Rows of the first of the wanted splits that the data set has."""
    try:
        import datasets  # type: ignore[import-not-found]  # deferred: an optional library
    except ImportError as error:
        raise UsageError(
            f"{repo_id} has no JSONL files named after a split (train, …); install `datasets` to read other "
            "formats, or save it as train.jsonl"
        ) from error
    available: Any = datasets.get_dataset_split_names(repo_id)
    for name in wanted:
        if name in available:
            rows = datasets.load_dataset(repo_id, split=name)
            yield [(f"{repo_id}, {name} row {index}", dict(row)) for index, row in enumerate(rows, 1)]
