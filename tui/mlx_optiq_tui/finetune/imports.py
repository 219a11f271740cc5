"""Bring rows in from files: JSONL, CSV and Markdown, each with the line it stands on.

Reads whole files and knows nothing of what a row must hold: ``rows`` says that afterwards.
"""

import csv
from pathlib import Path
from typing import Any

import msgspec

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.dataset import read_rows
from mlx_optiq_tui.finetune.rows import Row
from mlx_optiq_tui.finetune.turns import turns_of_text

__all__ = ["Imported", "import_rows"]

_PARTS = ("train", "valid", "test")
_CALLED = {
    **dict.fromkeys(("instruction", "question", "input", "user"), "prompt"),
    **dict.fromkeys(("output", "answer", "response", "assistant"), "completion"),
    "content": "text",
}
"""What columns of tables are often called → what training calls it."""
_AS_JSON = ("messages", "tools")


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """What a file held."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    """Lines that are no rows, each with file and line."""


def import_rows(path: Path) -> Imported:
    """Read a file, or train.jsonl, valid.jsonl and test.jsonl of a folder.

    Args:
        path: ``.jsonl``, ``.csv``, ``.tsv``, ``.md`` or ``.markdown``, or a folder.
    Raises:
        UsageError: It cannot be read, or is of another kind.
    """
    if path.is_dir():
        files = [file for part in _PARTS if (file := path / f"{part}.jsonl").is_file()]
        if not files:
            raise UsageError(f"{path} has no train.jsonl; name the file itself if it is called otherwise")
        found = [_import_jsonl(file) for file in files]
        return Imported(
            rows=tuple(row for each in found for row in each.rows),
            problems=tuple(problem for each in found for problem in each.problems),
        )
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".tsv", ".md", ".markdown"):
        raise UsageError(f"{path.name}: only JSONL, CSV, TSV and Markdown files can be imported")
    if not path.is_file():
        raise UsageError(f"{path} cannot be read: there is no such file")
    if suffix == ".jsonl":
        return _import_jsonl(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        why = f"it is not UTF-8 (byte {error.start}); save it as UTF-8"
        raise UsageError(f"{path} cannot be read: {why}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    return _import_markdown(text) if suffix.startswith(".m") else _import_table(path.name, text, suffix)


def _import_jsonl(file: Path) -> Imported:
    rows, problems = [], []
    for where, row in read_rows(file):
        if isinstance(row, dict):
            rows.append(row)
        else:
            said = f"not JSON ({row})" if isinstance(row, Exception) else "not an object"
            problems.append(f"{where}: {said}")
    return Imported(rows=tuple(rows), problems=tuple(problems))


def _import_table(name: str, text: str, suffix: str) -> Imported:
    """Rows of a table whose first line names the columns."""
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if suffix == ".tsv" else ",")
    names = [column.strip().lower() for column in reader.fieldnames or ()]
    if not names:
        raise UsageError(f"{name} is empty; its first line names the columns, such as prompt,completion")
    reader.fieldnames = _known_names(names)
    rows, problems = [], []
    for cells in reader:
        try:
            rows.append(_row_of_cells(cells))
        except msgspec.DecodeError as error:
            problems.append(f"{name}, line {reader.line_num}: messages and tools must be JSON ({error})")
    return Imported(rows=tuple(rows), problems=tuple(problems))


def _known_names(names: list[str]) -> list[str]:
    """What training calls the columns; a name is given once, to the first column that is called so."""
    given: list[str] = []
    for name in names:
        known = _CALLED.get(name, name)
        given.append(name if known in given or (known != name and known in names) else known)
    return given


def _row_of_cells(cells: dict[str, Any]) -> Row:
    filled = {
        column: cell for column, cell in cells.items() if column and isinstance(cell, str) and cell.strip()
    }
    return {
        column: msgspec.json.decode(cell) if column in _AS_JSON else cell for column, cell in filled.items()
    }


def _import_markdown(text: str) -> Imported:
    """Parts between lines of dashes: a conversation where headings name roles, else a text."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if len(line.strip()) >= 3 and not line.strip().strip("-"):
            parts.append([])
        else:
            parts[-1].append(line)
    rows: list[Row] = []
    for lines in parts:
        part = "\n".join(lines).strip()
        turns = turns_of_text(part)
        if turns:
            rows.append({"messages": turns})
        elif part:
            rows.append({"text": part})
    return Imported(rows=tuple(rows))
