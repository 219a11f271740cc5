"""A table of text on a terminal: aligned columns, the row of interest in bold."""

from collections.abc import Sequence

from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_tui.ansi import Style, paint

__all__ = ["draw_table"]

_GAP = "  "


def draw_table(table: TextTable, style: Style) -> str:
    """Draw a table.

    Cells that make it too wide are broken before ``±`` and ``(``; text columns are cut with an ellipsis
    where that is not enough.

    Args:
        table: What to show.
        style: Colours and width.
    Returns:
        Lines without a trailing newline.
    """
    cells: list[list[list[str]]] = [[[cell] for cell in row] for row in (table.columns, *table.rows)]
    if _total(_widths(cells)) > style.width:
        cells = [[_broken(cell[0]) for cell in row] for row in cells]
    widths = _fitted(_widths(cells), style.width)
    is_text = [table.is_text(i) for i in range(len(table.columns))]
    lines = [paint(table.title, style, bold=True)] if table.title else []
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


def _fitted(widths: list[int], width: int) -> list[int]:
    """Narrow the widest columns until all fit."""
    while _total(widths) > width and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    return widths


def _line(parts: Sequence[str], widths: Sequence[int], is_text: Sequence[bool]) -> str:
    columns = []
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        cut = part if len(part) <= width else part[: width - 1] + "…"
        columns.append(cut.ljust(width) if is_text[index] else cut.rjust(width))
    return _GAP.join(columns).rstrip()
