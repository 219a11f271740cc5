"""Two lines on top of every screen: where one is and can go, and what the server is doing."""

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.connection import Connection
from mlx_optiq_tui.lab import lab_of

__all__ = ["TopBar"]


class _Tab(Static):
    """One screen's key and title; a click opens it."""

    def __init__(self, name: str, key: str, title: str) -> None:
        super().__init__(f" {key} {title} ", classes="tab", markup=False)
        self._name_of_screen = name

    async def on_click(self, event: events.Click) -> None:
        """Open it."""
        event.stop()
        await self.app.run_action(f"open('{self._name_of_screen}')")


class TopBar(Vertical):
    """Tabs; connection, model, memory and running jobs."""

    DEFAULT_CSS = """
    TopBar { dock: top; height: 2; background: $panel; }
    TopBar Horizontal { height: 1; }
    TopBar .tab { width: auto; color: $text-muted; }
    TopBar .tab:hover { background: $surface; }
    TopBar .tab.-here { background: $primary; color: $background; text-style: bold; }
    TopBar #state { height: 1; }
    """

    def compose(self) -> ComposeResult:
        """Tabs above, state below."""
        lab = lab_of(self)
        with Horizontal():
            for entry in lab.entries:
                tab = _Tab(entry.name, entry.key, entry.title)
                tab.set_class(entry.name == lab.current_mode, "-here")
                yield tab
        yield Static(id="state", markup=False)

    def on_mount(self) -> None:
        """Follow the app."""
        lab = lab_of(self)
        self.watch(lab, "status", self._draw)
        self.watch(lab, "connection", self._draw)
        lab.job_signal.subscribe(self, self._draw)

    def _draw(self, *_: object) -> None:
        lab = lab_of(self)
        self.query_one("#state", Static).update(
            state_line(lab.connection, lab.status, lab.client.url, [job.title for job in lab.jobs.running])
        )


_SIGNS = {"connecting": "◌", "connected": "●", "lost": "✕"}


def state_line(connection: Connection, status: EngineStatus | None, url: str, jobs: list[str]) -> Text:
    """What the second line says, the most important first, for it may be cut."""
    style = {"connected": "green", "lost": "bold red"}.get(connection.state, "")
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f" {_SIGNS[connection.state]} ", style)
    shown = status if connection.state == "connected" else None
    text.append(f"{shown.state if shown else connection.words(url)}  ", "" if shown else style)
    if jobs:
        text.append(f"⚙ {jobs[0]}" + (f" and {len(jobs) - 1} more" if len(jobs) > 1 else "") + "  ", "bold")
    if shown:
        loaded = [model.id for model in shown.models if model.loaded]
        running = sum(row.state != "queued" for row in shown.rows)
        text.append(", ".join(loaded) or "no model loaded", "bold")
        text.append(f"  {format_nbytes(shown.memory_nbytes)} of {format_nbytes(shown.memory_limit_nbytes)}")
        text.append(f"  {running} running, {len(shown.rows) - running} waiting")
    return text
