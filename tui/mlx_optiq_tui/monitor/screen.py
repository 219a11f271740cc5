"""The monitor: speed, batch, memory, requests, KV caches and log of the server, as they change."""

import contextlib
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container, Vertical
from textual.message import Message
from textual.widgets import DataTable, Static

from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.lab_screen import EmptyState, LabScreen
from mlx_optiq_tui.monitor.log_panel import LogPanel
from mlx_optiq_tui.monitor.pictures import (
    kv_picture,
    memory_picture,
    row_cells,
    speed_picture,
    totals_picture,
)
from mlx_optiq_tui.widgets.plain_table import PlainTable

__all__ = ["MonitorScreen"]

_COLUMNS = {
    "state": 7,
    "tok/s": 6,
    "lately": 10,
    "first": 7,
    "prompt": 9,
    "cached": 6,
    "out": 5,
    "age": 6,
    "adapter": 10,
    "model": 24,
    "session": 12,
}
"""Widths; those of the content would change all the time."""


class MonitorScreen(LabScreen):
    """What the server is doing. In small terminals one of three panels is shown at a time."""

    HELP_TEXT = """# Monitor

Speed is that of all requests over the last ten seconds; `lately` is one request's own, second by second.
`first` is the time from its arrival to its first token. Memory is what MLX holds, against `--memory` of the
server. KV columns are coloured by the bits of the cache (`F`: full precision).

In a small terminal `r`, `k` and `l` choose the panel; else they take the focus there."""

    CSS = """
    MonitorScreen #head { height: auto; padding: 0 1; }
    MonitorScreen Static { text-wrap: nowrap; text-overflow: ellipsis; }
    MonitorScreen #speed, MonitorScreen #memory, MonitorScreen #totals { height: auto; }
    MonitorScreen #panels { height: 1fr; }
    MonitorScreen #panels > * { border: round $panel; border-title-color: $text-muted; height: 1fr; }
    MonitorScreen #panels > *:focus-within { border: round $primary; }
    MonitorScreen #rows { border: round $panel; }
    MonitorScreen #rows:focus { border: round $primary; }
    MonitorScreen #caches { padding: 0 1; }
    MonitorScreen.-wide.-tall #head { layout: grid; grid-size: 2; grid-gutter: 0 3; grid-rows: 5; }
    MonitorScreen.-wide.-tall #totals { column-span: 2; }
    MonitorScreen.-wide.-tall #panels { layout: grid; grid-size: 2 2; grid-columns: 3fr 2fr; }
    MonitorScreen.-wide.-tall #log { column-span: 2; }
    MonitorScreen.-narrow #panels > *, MonitorScreen.-short #panels > * { display: none; }
    MonitorScreen.-narrow #panels > .-front, MonitorScreen.-short #panels > .-front { display: block; }
    MonitorScreen #waiting { display: none; }
    MonitorScreen.-unseen #waiting { display: block; }
    MonitorScreen.-unseen #head, MonitorScreen.-unseen #panels { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("r", "panel('rows')", "Requests"),
        ("k", "panel('caches')", "KV caches"),
        ("l", "panel('log')", "Log"),
        ("slash", "filter", "Filter log"),
    ]

    class Logged(Message):
        """The server wrote a line to its log."""

        def __init__(self, line: LogLine) -> None:
            super().__init__()
            self.line = line

    def __init__(self) -> None:
        super().__init__(classes="-unseen")

    def compose_body(self) -> ComposeResult:
        """Numbers above, panels below."""
        yield EmptyState(id="waiting")
        with Vertical(id="head", classes="live"):
            yield Static(id="speed", markup=False)
            yield Static(id="memory", markup=False)
            yield Static(id="totals", markup=False)
        with Container(id="panels", classes="live"):
            rows = PlainTable(id="rows", classes="-front", cursor_type="row")
            rows.border_title = "Requests"
            yield rows
            caches = Static(id="caches", markup=False)
            caches.border_title = "KV caches"
            yield caches
            log = LogPanel(id="log")
            log.border_title = "Log"
            yield log

    def on_mount(self) -> None:
        """Begin to follow the log."""
        for label, width in _COLUMNS.items():
            self.query_one(DataTable).add_column(label, width=width)
        self.watch(lab_of(self), "connection", self._draw_waiting)
        self._follow_log()

    @work
    async def _follow_log(self) -> None:
        async with contextlib.aclosing(self.lab.client.follow_log()) as lines:
            async for line in lines:
                self.post_message(self.Logged(line))

    def on_monitor_screen_logged(self, message: Logged) -> None:
        """Show a line."""
        self.query_one(LogPanel).add(message.line)

    def on_resize(self) -> None:
        """Draw for the new width."""
        self.call_after_refresh(self._draw)

    def on_screen_resume(self) -> None:
        """Draw what came meanwhile."""
        self._draw()

    def status_changed(self, status: EngineStatus | None) -> None:
        """Take a snapshot, and draw it where it can be seen."""
        self.set_class(status is None, "-unseen")
        if status is not None and self.is_current:
            self._draw()

    def _draw_waiting(self) -> None:
        self.query_one("#waiting", EmptyState).update(self.lab.waiting_words)

    def _draw(self) -> None:
        status = self.lab.status
        if status is None:
            return
        speed, memory = self.query_one("#speed", Static), self.query_one("#memory", Static)
        speed.update(speed_picture(status, self.lab.history, speed.content_size.width or 76, self.lab.inks))
        memory.update(memory_picture(status, memory.content_size.width or 76))
        self.query_one("#totals", Static).update(totals_picture(status, self.lab.inks))
        caches = self.query_one("#caches", Static)
        size = caches.content_size
        caches.update(kv_picture(status.kv_layers, size.width or 76, size.height or 8))
        self._draw_rows(status)

    def _draw_rows(self, status: EngineStatus) -> None:
        table = self.query_one(DataTable)
        shown = {row.id: row_cells(row, self.lab.history) for row in status.rows}
        columns = list(table.columns)
        for key in [key for key in table.rows if key.value not in shown]:
            table.remove_row(key)
        known = {key.value for key in table.rows}
        for id, cells in shown.items():
            if id not in known:
                table.add_row(*cells, key=id)
                continue
            for column, cell in zip(columns, cells, strict=True):
                table.update_cell(id, column, cell)

    def action_panel(self, name: str) -> None:
        """Bring a panel to the front and give it the focus."""
        for panel in self.query("#panels > *"):
            panel.set_class(panel.id == name, "-front")
        target = self.query_one(f"#{name}")
        if isinstance(target, LogPanel):
            target = target.query_one("RichLog")
        target.focus()
        self.call_after_refresh(self._draw)

    def action_filter(self) -> None:
        """Write the log's filter."""
        self.action_panel("log")
        self.query_one("#filter").focus()
