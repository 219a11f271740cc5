"""The dataset designer: rows from templates and files, each checked as training would, split and saved.

Holds the rows; reads and writes files in threads.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Button, DataTable, Input, Label, Select, Static

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_tui.finetune.data_words import count_words, lines_words, summary_words
from mlx_optiq_tui.finetune.draft import forget_draft, keep_draft, read_draft
from mlx_optiq_tui.finetune.imports import Imported, import_rows
from mlx_optiq_tui.finetune.problem_list import ProblemList
from mlx_optiq_tui.finetune.row_editor import RowEditor
from mlx_optiq_tui.finetune.rows import FORMS_OF, Checks, Method, Row, form_of, row_words, template
from mlx_optiq_tui.finetune.splits import Split, save_split, split_rows
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.question import Question
from mlx_optiq_tui.widgets.plain_table import PlainTable

__all__ = ["DataPane"]

_SHOWN_ROWS = 2000
"""Listed at a time; the others are a page away."""
_DRAFT_AFTER_S = 1.0


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

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.method: Method = "sft"
        """By whose rules rows are read."""
        self._checks = Checks()
        self._problems: dict[int, str] = {}
        self._not_taken: tuple[str, ...] = ()
        self._listed = range(0)
        """Indices of the rows that are shown."""
        self._is_dirty = False

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
        yield PlainTable(id="rows", cursor_type="row")
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
        """Columns, and what was not saved last time."""
        self.query_one(DataTable).add_columns("row", "form", "", "content")
        draft = None if lab_of(self).is_demo else read_draft()
        if draft is not None and draft.rows:
            self.method = draft.method
            self.query_one("#method", Select).value = draft.method
            self.rows += draft.rows
            self.app.notify(f"{count_words(len(draft.rows))} not saved last time: g saves, c clears")
        self.draw()

    def on_unmount(self) -> None:
        """Keep what was not saved."""
        if self._is_dirty:
            self._keep()

    @property
    def here(self) -> int | None:
        """Index of the row under the cursor."""
        place = self._listed.start + self.query_one(DataTable).cursor_row
        return place if place < len(self.rows) else None

    @on(Select.Changed, "#method")
    def _method_changed(self, event: Select.Changed) -> None:
        event.stop()
        self.method = "dpo" if event.value == "dpo" else "sft"
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

    @on(DataTable.RowHighlighted)
    def _row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        self._say()

    @on(Input.Submitted, "#path")
    def _path_given(self, event: Input.Submitted) -> None:
        event.stop()
        self._read(Path(event.value.strip()).expanduser())

    def add(self) -> None:
        """Add a row from the template of the form that is chosen, and edit it."""
        forms = FORMS_OF[self.method]
        form = next((each for each in forms if each == self.query_one("#form", Select).value), forms[0])
        self._change([*self.rows, template(form)], len(self.rows))
        self.edit(len(self.rows) - 1, is_new=True)

    def edit(self, place: int | None, *, is_new: bool = False) -> None:
        """Edit the row of index ``place``; a new one goes again where the editor is left."""
        if place is None:
            return

        def keep(row: Row | None) -> None:
            before, after = self.rows[:place], self.rows[place + 1 :]
            if row is not None:
                self._change([*before, row, *after], place)
            elif is_new:
                self._change([*before, *after], place - 1)

        self.app.push_screen(RowEditor(self.rows[place], self.method), keep)

    def delete(self) -> None:
        """Delete the row under the cursor."""
        if (place := self.here) is not None:
            self._change([*self.rows[:place], *self.rows[place + 1 :]], min(place, len(self.rows) - 2))

    def clear(self) -> None:
        """Give all rows up, after asking."""

        def answered(agreed: bool | None) -> None:
            if agreed:
                self._not_taken, self._checks = (), Checks()
                self._change([], None)

        if self.rows or self._not_taken:
            self.app.push_screen(
                Question(f"Clear {count_words(len(self.rows))}? Files stay as they are.", yes="Clear"),
                answered,
            )

    def page(self, step: int) -> None:
        """List the rows behind, or before."""
        if 0 <= (place := self._listed.start + step * _SHOWN_ROWS) < len(self.rows):
            self.draw(place)

    def list_problems(self) -> None:
        """Show all that is wrong, to choose the row from."""
        if self._problems or self._not_taken:
            self.app.push_screen(ProblemList(self._problems, self._not_taken), self._go_to)

    def _go_to(self, place: int | None) -> None:
        if place is not None:
            self.draw(place)

    def _change(self, rows: list[Row], cursor: int | None) -> None:
        """Hold other rows, and keep them as a draft."""
        self.rows = rows
        self._is_dirty = not lab_of(self).is_demo
        self.draw(cursor)
        if self._is_dirty:
            self._keep_soon()

    @work(exclusive=True, group="draft")
    async def _keep_soon(self) -> None:
        await asyncio.sleep(_DRAFT_AFTER_S)
        await asyncio.to_thread(self._keep)

    def _keep(self) -> None:
        # A disk that is full or read-only keeps no draft; saving says so.
        with contextlib.suppress(OSError):
            keep_draft(self.method, self.rows)
            self._is_dirty = False

    @work(exclusive=True)
    async def _read(self, path: Path) -> None:
        try:
            imported = await asyncio.to_thread(import_rows, path)
        except OptiqError as error:
            self.app.notify(str(error), severity="error")
            return
        # Looked at here already, for that takes long where there are many.
        look, rows = self._checks.problems, imported.rows
        wrong = {method: len(await asyncio.to_thread(look, rows, method)) for method in FORMS_OF}
        self._take(path.name, imported, wrong)

    def _take(self, file: str, found: Imported, wrong: Mapping[Method, int]) -> None:
        self._not_taken = found.problems
        other: Method = "sft" if self.method == "dpo" else "dpo"
        if not self.rows and wrong[other] < wrong[self.method]:
            self.method = other
            self.query_one("#method", Select).value = other
        said = f"{count_words(len(found.rows))} from {file}"
        if found.problems:
            said += f", {lines_words(len(found.problems))} not taken (w)"
        self.app.notify(said, severity="information" if found.rows and not found.problems else "warning")
        self._change([*self.rows, *found.rows], len(self.rows))

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
        self.workers.cancel_group(self, "draft")
        self._is_dirty = False
        await asyncio.to_thread(forget_draft)
        self.app.notify(f"{split.words} in {folder}")
        self.post_message(self.Saved(str(folder), self.method))

    def draw(self, cursor: int | None = None) -> None:
        """Show the rows, each with a sign whether it can be used; point at the one of index ``cursor``."""
        table = self.query_one(DataTable)
        self._problems = problems = self._checks.problems(self.rows, self.method)
        place = min(max(cursor or 0, 0), max(len(self.rows) - 1, 0))
        first = place // _SHOWN_ROWS * _SHOWN_ROWS
        self._listed = range(first, min(first + _SHOWN_ROWS, len(self.rows)))
        table.clear()
        for index in self._listed:
            row = self.rows[index]
            table.add_row(f"{index + 1:,}", form_of(row), "✕" if index in problems else "✓", row_words(row))
        if cursor is not None and self.rows:
            table.move_cursor(row=place - first)
            table.focus()
        self._say()

    def _say(self) -> None:
        words = summary_words(len(self.rows), self._problems, self._not_taken, self._listed, self.here)
        self.query_one("#problems", Static).update(words)


def _choices(method: Method) -> list[tuple[str, str]]:
    return [(form, form) for form in FORMS_OF[method]]
