"""Tables, facts and notes as shapes, for media without tables of their own."""

from mlx_optiq_ext.quant.picture import Line, Rect, Scene, Shape, Text, text_width
from mlx_optiq_ext.types.report import TextTable

__all__ = ["facts_scene", "list_scene", "table_scene"]

_WIDTH = 960.0
_ROW = 26.0
_GAP = 26.0
_LINE = 22.0


def table_scene(table: TextTable) -> Scene:
    """A table with a rule under its head; the row of interest in colour."""
    rows = (table.columns, *table.rows)
    widths = [max(text_width(row[i]) for row in rows) for i in range(len(table.columns))]
    spare = _WIDTH - sum(widths) - _GAP * (len(widths) - 1)
    if spare > 0:
        share = min(spare / len(widths), 60.0)
        widths = [width + share for width in widths]
    total = sum(widths) + _GAP * (len(widths) - 1)
    shapes: list[Shape] = []
    for index, row in enumerate(rows):
        y = _ROW * index + 17
        is_this = table.highlight is not None and index == table.highlight + 1
        ink = "muted" if index == 0 else "chosen" if is_this else "text"
        x = 0.0
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            at, anchor = (x, "start") if table.is_text(column) else (x + width, "end")
            shapes.append(Text(x=at, y=y, text=cell, ink=ink, anchor=anchor, is_bold=is_this))
            x += width + _GAP
        ink = "muted" if index == 0 else "grid"
        shapes.append(Line(x1=0, y1=_ROW * (index + 1), x2=total, y2=_ROW * (index + 1), ink=ink))
    return Scene(
        title=table.title,
        subtitle=table.note,
        width=max(total, _WIDTH),
        height=_ROW * len(rows) + 2,
        shapes=tuple(shapes),
    )


def facts_scene(facts: tuple[tuple[str, str], ...]) -> Scene:
    """Names and values on a panel; values that are too long go on in the next line."""
    left = max(text_width(name) for name, _ in facts) + 44
    shapes: list[Shape] = []
    y = 28.0
    for name, value in facts:
        shapes.append(Text(x=20, y=y, text=name, ink="muted"))
        for line in _wrapped(value, _WIDTH - left - 20):
            shapes.append(Text(x=left, y=y, text=line))
            y += _LINE
    height = y - 28.0 + 24
    panel = Rect(x=0, y=0, width=_WIDTH, height=height, fill="panel", radius=8)
    return Scene(title="", width=_WIDTH, height=height, shapes=(panel, *shapes))


def list_scene(title: str, items: tuple[str, ...]) -> Scene:
    """Sentences below a heading, each with a dash."""
    shapes: list[Shape] = []
    y = 14.0
    for item in items:
        shapes.append(Text(x=0, y=y, text="–", ink="muted"))
        for line in _wrapped(item, _WIDTH - 16):
            shapes.append(Text(x=16, y=y, text=line))
            y += _LINE
    return Scene(title=title, width=_WIDTH, height=y - 8, shapes=tuple(shapes))


def _wrapped(text: str, width: float) -> list[str]:
    """Lines no wider than ``width``, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]
