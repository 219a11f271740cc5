"""A table whose cells are text as it is: Textual reads markup in strings, and file contents hold brackets."""

from typing import Any

from rich.markup import escape
from rich.text import Text
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey, RowKey

__all__ = ["PlainTable"]


class PlainTable(DataTable[Any]):
    """A :class:`textual.widgets.DataTable` that reads no markup in its cells."""

    def add_row(
        self, *cells: Any, height: int | None = 1, key: str | None = None, label: str | Text | None = None
    ) -> RowKey:
        """Add a row; strings are shown as they are.

        Args:
            cells: One for each column.
            height: Lines; None fits the content.
            key: Names the row.
            label: Left of it.
        """
        return super().add_row(*map(_plain, cells), height=height, key=key, label=label)

    def update_cell(
        self, row_key: RowKey | str, column_key: ColumnKey | str, value: Any, *, update_width: bool = False
    ) -> None:
        """Change a cell; a string is shown as it is.

        Args:
            row_key: Of the row.
            column_key: Of the column.
            value: The new content.
            update_width: Whether the column grows with it.
        """
        super().update_cell(row_key, column_key, _plain(value), update_width=update_width)


def _plain(cell: Any) -> Any:
    return escape(cell) if isinstance(cell, str) else cell
