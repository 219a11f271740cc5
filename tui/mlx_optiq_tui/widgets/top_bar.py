"""Two lines on top of every screen: where one is and can go, and what the server is doing."""

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_tui.lab import lab_of

__all__ = ["TopBar"]

_SIGNS = {"connecting": "◌", "connected": "●", "lost": "✕"}


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
        self.watch(lab, "theme", self._draw)
        lab.job_signal.subscribe(self, self._draw)

    def _draw(self, *_: object) -> None:
        self.query_one("#state", Static).update(self._state_line())

    def _state_line(self) -> Text:
        """What the second line says, the most important first, for it may be cut."""
        lab = lab_of(self)
        state, inks = lab.connection.state, lab.inks
        style = {"connected": inks.good, "lost": inks.bad}.get(state, "")
        shown = lab.status if state == "connected" else None
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f" {_SIGNS[state]} ", style)
        text.append(
            f"{shown.state if shown else lab.connection.words(lab.client.url)}  ", "" if shown else style
        )
        jobs = lab.jobs.running
        if jobs:
            more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
            text.append(f"⚙ {jobs[0].title}{more}  ", "bold")
        if shown:
            loaded = [model.id for model in shown.models if model.loaded]
            running = sum(row.state != "queued" for row in shown.rows)
            text.append(", ".join(loaded) or "no model loaded", "bold")
            text.append(
                f"  {format_nbytes(shown.memory_nbytes)} of {format_nbytes(shown.memory_limit_nbytes)}"
            )
            text.append(f"  {running} running, {len(shown.rows) - running} waiting")
        return text
