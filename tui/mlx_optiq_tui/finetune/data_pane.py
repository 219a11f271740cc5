"""The dataset designer: rows from templates and files, each checked as training would, split and saved.

Holds the rows; reads and writes files in threads.
"""

import asyncio
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Button, DataTable, Input, Label, Select, Static

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_tui.finetune.imports import Imported, import_rows
from mlx_optiq_tui.finetune.row_editor import RowEditor
from mlx_optiq_tui.finetune.rows import FORMS_OF, Method, Row, form_of, problems_of, row_words, template
from mlx_optiq_tui.finetune.splits import Split, save_split, split_rows

__all__ = ["DataPane"]

_SHOWN_PROBLEMS = 2
_SHOWN_ROWS = 2000
"""Listed; those behind are checked and saved all the same."""


class DataPane(Vertical):
    """Rows over what is wrong with them, and where they go."""

    DEFAULT_CSS = """
    DataPane { padding: 0 1; }
    DataPane Horizontal { height: 1; }
    DataPane Label { width: auto; color: $text-muted; margin-right: 1; }
    DataPane #method { width: 10; }
    DataPane #form { width: 16; }
    DataPane #path, DataPane #data-out { width: 1fr; }
    DataPane .share { width: 8; }
    DataPane #rows { height: 1fr; }
    DataPane #problems { height: auto; max-height: 4; }
    DataPane Button { margin-left: 1; }
    """

    class Saved(Message):
        """The data set was written."""

        def __init__(self, folder: str, method: Method) -> None:
            super().__init__()
            self.folder = folder
            self.method = method

    class _Read(Message):
        def __init__(self, file: str, imported: Imported) -> None:
            super().__init__()
            self.file = file
            self.imported = imported

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._said: tuple[str, ...] = ()

    def compose(self) -> ComposeResult:
        """Where rows come from, the rows, where they go."""
        with Horizontal():
            yield Label("Method")
            yield Select(
                [(name, name) for name in FORMS_OF], value="sft", allow_blank=False, id="method", compact=True
            )
            yield Label(" New")
            yield Select(_choices("sft"), value="chat", allow_blank=False, id="form", compact=True)
            yield Button("Add (n)", id="add", compact=True)
        with Horizontal():
            yield Label("Import")
            yield Input(placeholder="JSONL, CSV or Markdown file, or a folder", id="path", compact=True)
        yield DataTable(id="rows", cursor_type="row")
        yield Static(id="problems", markup=False)
        with Horizontal():
            yield Label("Folder")
            yield Input("data", id="data-out", compact=True)
        with Horizontal():
            for name, value in (("valid", "0.1"), ("test", "0.1"), ("seed", "0")):
                yield Label(f"{name} ")
                yield Input(value, id=f"share-{name}", classes="share", compact=True)
            yield Button("Save (g)", id="save", variant="primary", compact=True)

    def on_mount(self) -> None:
        """Columns."""
        self.query_one(DataTable).add_columns("line", "form", "", "row")
        self.draw()

    @property
    def method(self) -> Method:
        """By whose rules rows are read."""
        return "dpo" if self.query_one("#method", Select).value == "dpo" else "sft"

    @property
    def here(self) -> int | None:
        """Index of the row under the cursor."""
        table = self.query_one(DataTable)
        return table.cursor_row if self.rows and table.cursor_row < len(self.rows) else None

    @on(Select.Changed, "#method")
    def _method_changed(self, event: Select.Changed) -> None:
        event.stop()
        forms = self.query_one("#form", Select)
        forms.set_options(_choices(self.method))
        forms.value = FORMS_OF[self.method][0]
        self.draw()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "add":
            self.add()
        else:
            self.save()

    @on(DataTable.RowSelected)
    def _row_selected(self, event: DataTable.RowSelected) -> None:
        event.stop()
        self.edit(self.here)

    @on(Input.Submitted, "#path")
    def _path_given(self, event: Input.Submitted) -> None:
        event.stop()
        self._read(Path(event.value.strip()).expanduser())

    def add(self) -> None:
        """Add a row from the template of the form that is chosen, and edit it."""
        forms = FORMS_OF[self.method]
        form = next((each for each in forms if each == self.query_one("#form", Select).value), forms[0])
        self.rows.append(template(form))
        self.draw(len(self.rows) - 1)
        self.edit(len(self.rows) - 1)

    def edit(self, place: int | None) -> None:
        """Edit a row.

        Args:
            place: Its index; None edits nothing.
        """
        if place is None:
            return

        def keep(row: Row | None) -> None:
            if row is not None:
                self.rows[place] = row
                self.draw(place)

        self.app.push_screen(RowEditor(self.rows[place], self.method), keep)

    def delete(self) -> None:
        """Delete the row under the cursor."""
        place = self.here
        if place is not None:
            del self.rows[place]
            self.draw(min(place, len(self.rows) - 1))

    @work(exclusive=True)
    async def _read(self, path: Path) -> None:
        try:
            self.post_message(self._Read(path.name, await asyncio.to_thread(import_rows, path)))
        except OptiqError as error:
            self.app.notify(str(error), severity="error")

    def on_data_pane__read(self, message: _Read) -> None:
        """Take what a file held."""
        found = message.imported
        self.rows += found.rows
        self._said = found.problems
        self.app.notify(f"{len(found.rows)} rows from {message.file}")
        self.draw()
        self.query_one(DataTable).focus()

    def save(self) -> None:
        """Split by seed and write."""
        try:
            split = self._split()
        except UsageError as error:
            self.app.notify(str(error), severity="warning")
            return
        folder = self.query_one("#data-out", Input).value.strip()
        self._write(Path(folder).expanduser(), split)

    def _split(self) -> Split:
        shares = [self.query_one(f"#share-{name}", Input).value.strip() for name in ("valid", "test", "seed")]
        try:
            valid, test, seed = float(shares[0]), float(shares[1]), int(shares[2])
        except ValueError:
            raise UsageError("valid and test are shares such as 0.1, seed is a whole number") from None
        return split_rows(self.rows, self.method, valid_share=valid, test_share=test, seed=seed)

    @work(exclusive=True)
    async def _write(self, folder: Path, split: Split) -> None:
        try:
            await asyncio.to_thread(save_split, folder, split)
        except (OptiqError, OSError) as error:
            self.app.notify(str(error), severity="error")
            return
        self.app.notify(f"{split.words} in {folder}")
        self.post_message(self.Saved(str(folder), self.method))

    def draw(self, cursor: int | None = None) -> None:
        """Show the rows, each with what is wrong.

        Args:
            cursor: Index of the row to point at.
        """
        table = self.query_one(DataTable)
        problems = problems_of(self.rows, self.method)
        table.clear()
        for index, row in enumerate(self.rows[:_SHOWN_ROWS]):
            table.add_row(str(index + 1), form_of(row), "✕" if index in problems else "✓", row_words(row))
        if cursor is not None and self.rows:
            table.move_cursor(row=min(max(cursor, 0), _SHOWN_ROWS - 1))
            table.focus()
        said = [f"line {index + 1}: {problem}" for index, problem in problems.items()] + list(self._said)
        more = [f"and {len(said) - _SHOWN_PROBLEMS} more"] if len(said) > _SHOWN_PROBLEMS else []
        words = (
            "\n".join([*said[:_SHOWN_PROBLEMS], *more])
            or f"{len(self.rows)} rows, nothing wrong{_unlisted(len(self.rows))}"
        )
        self.query_one("#problems", Static).update(
            words if self.rows or said else "no rows yet: add one from a template (n), or import a file (i)"
        )


def _unlisted(count: int) -> str:
    return f"; the first {_SHOWN_ROWS} are listed" if count > _SHOWN_ROWS else ""


def _choices(method: Method) -> list[tuple[str, str]]:
    return [(form, form) for form in FORMS_OF[method]]
