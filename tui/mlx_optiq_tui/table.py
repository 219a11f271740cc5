"""A table of text on a terminal: aligned columns, the row of interest in bold."""

import re
from collections.abc import Sequence

from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_tui.ansi import Style, paint

__all__ = ["draw_table"]

_GAP = "  "
_PIECE = re.compile(r"(?:[^ /_.-]|\.(?=\d))*(?:[ /_-]|\.(?!\d))+|.+")
_NARROWEST = 12
"""Columns of words are folded down to this width before anything is cut."""


def draw_table(table: TextTable, style: Style) -> str:
    """Draw a table.

    Cells that make it too wide are broken before ``±`` and ``(``; where that is not enough, words and names
    go on in the next line. Only what fits in no other way is cut, with an ellipsis.

    Args:
        table: What to show.
        style: Colours and width.
    Returns:
        Lines without a trailing newline.
    """
    is_text = [table.is_text(i) for i in range(len(table.columns))]
    cells: list[list[list[str]]] = [[[cell] for cell in row] for row in (table.columns, *table.rows)]
    if _total(_widths(cells)) > style.width:
        cells = [[_broken(cell[0]) for cell in row] for row in cells]
    widths = _fitted(_widths(cells), _least(cells, is_text), style.width)
    cells = [
        [
            [line for part in cell for line in _folded(part, width)]
            for cell, width in zip(row, widths, strict=True)
        ]
        for row in cells
    ]
    widths = _widths(cells) if _total(_widths(cells)) <= style.width else widths
    lines = [paint(line, style, bold=True) for line in wrapped(table.title, style.width)]
    for index, row in enumerate(cells):
        for height in range(max(len(cell) for cell in row)):
            parts = [cell[height] if height < len(cell) else "" for cell in row]
            line = _line(parts, widths, is_text)
            highlighted = table.highlight is not None and index == table.highlight + 1
            lines.append(paint(line, style, bold=highlighted, dim=index == 0))
        if index == 0:
            lines.append(paint(_GAP.join("─" * width for width in widths), style, dim=True))
    if table.note:
        lines += [paint(line, style, dim=True) for line in wrapped(table.note, style.width)]
    return "\n".join(lines)


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Break ``text`` at spaces into lines of at most ``width``; all but the first are indented."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line] if line else lines


def _broken(cell: str) -> list[str]:
    for mark in (" ±", " (", ", "):
        head, found, tail = cell.partition(mark)
        if found:
            return [head + mark.rstrip() if mark == ", " else head, (found + tail).removeprefix(",").strip()]
    return [cell]


def _widths(cells: Sequence[Sequence[Sequence[str]]]) -> list[int]:
    return [max(len(part) for row in cells for part in row[i]) for i in range(len(cells[0]))]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _least(cells: Sequence[Sequence[Sequence[str]]], is_text: Sequence[bool]) -> list[int]:
    """How narrow each column may become before numbers are cut; words and headings can be folded."""
    return [
        min(_NARROWEST, max(len(part) for row in cells for part in row[i]))
        if is_text[i]
        else max((len(part) for row in cells[1:] for part in row[i]), default=1)
        for i in range(len(is_text))
    ]


def _fitted(widths: list[int], least: Sequence[int], width: int) -> list[int]:
    """Narrow the widest columns until all fit: first those that can be folded, then any."""
    for floor in (least, [4] * len(widths)):
        while _total(widths) > width:
            wide = [i for i in range(len(widths)) if widths[i] > floor[i]]
            if not wide:
                break
            widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _folded(text: str, width: int) -> list[str]:
    """Break a name or words after a space, hyphen, slash, dot or underscore; numbers stay whole."""
    if len(text) <= width or text[:1].isdigit():
        return [text]
    lines, line = [], ""
    for piece in _PIECE.findall(text):
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return [*lines, line.rstrip()]


def _line(parts: Sequence[str], widths: Sequence[int], is_text: Sequence[bool]) -> str:
    columns = []
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        cut = part if len(part) <= width else part[: width - 1] + "…"
        columns.append(cut.ljust(width) if is_text[index] else cut.rjust(width))
    return _GAP.join(columns).rstrip()
