"""The dashboard: its screens by key, the connection to the server, the jobs that run on between screens.

Knows no single screen (``screens`` names them) and speaks to the server through ``client`` only. Workers
follow the server and post messages; handlers change the state that screens draw.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.message import Message
from textual.notifications import SeverityLevel
from textual.reactive import reactive
from textual.screen import Screen
from textual.signal import Signal

from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.client import Lost, ServerClient
from mlx_optiq_tui.connection import Connection
from mlx_optiq_tui.control_filter import ControlFilter
from mlx_optiq_tui.help_screen import HelpScreen, key_list, shown_bindings
from mlx_optiq_tui.history import History
from mlx_optiq_tui.jobs import Job, Jobs
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.question import Question
from mlx_optiq_tui.screens import installed_screens
from mlx_optiq_tui.themes import DEFAULT_THEME, THEMES, Inks

__all__ = ["LabApp"]

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_LAST_S = 10.0
"""From a signal to the end, whatever hangs; jobs save on their own."""


class LabApp(App[None]):
    """The dashboard.

    Args:
        client: The server to show; closed with the app.
        is_demo: Whether ``client`` answers from a recording.
        first: Name of the screen to open.
    """

    TITLE = "optiq lab"
    CSS = """
    Screen.-lost .live { opacity: 60%; }
    Footer.-compact FooterKey.-command-palette { margin-right: 0; padding-right: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f9", "help", "Help", key_display="F9"),
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True),
        Binding("ctrl+t", "change_theme", "Theme", show=False),
    ]

    status: reactive[EngineStatus | None] = reactive(None)
    """The server's latest snapshot; None until it was reached once, and stale while it is lost."""
    connection: reactive[Connection] = reactive(Connection())

    class Seen(Message):
        """The server told its status, or was lost."""

        def __init__(self, news: EngineStatus | Lost) -> None:
            super().__init__()
            self.news = news

    def __init__(self, client: ServerClient, *, is_demo: bool = False, first: str = "") -> None:
        super().__init__()
        # Asks the terminal which pictures it can show, which is possible only before the app runs. One that
        # does not answer gets pictures made of blocks; a warning would only stay on the terminal.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        importlib.import_module("textual_image.widget")
        self.client = client
        self.is_demo = is_demo
        self.jobs = Jobs(self._job_changed)
        self.job_signal: Signal[Job] = Signal(self, "job")
        self.entries = installed_screens()
        self.history = History()
        self._control_filter = ControlFilter()
        self._handlers: dict[signal.Signals, Any] = {}
        self._first = first or self.entries[0].name
        for theme in THEMES:
            self.register_theme(theme)
        for entry in self.entries:
            self.add_mode(entry.name, entry.make)
            self.bind(
                f"{entry.key},f{entry.key}", f"open('{entry.name}')", description=entry.title, show=False
            )

    async def on_mount(self) -> None:
        """Open the first screen and follow the server."""
        self.theme = DEFAULT_THEME
        self._catch_signals()
        await self.switch_mode(self._first)
        self._follow_server()

    async def on_unmount(self) -> None:
        """Leave nothing behind: jobs stop where they can go on from."""
        await self.jobs.close()
        await self.client.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _catch_signals(self) -> None:
        """Leave by SIGTERM and where the terminal is closed, even if that takes nothing any more."""
        loop, told = asyncio.get_running_loop(), False

        def told_to_end(number: int, _frame: object) -> None:
            nonlocal told
            if told:
                os._exit(128 + number)
            told = True
            for job in self.jobs.running:
                job.stop()
            last = threading.Timer(_LAST_S, os._exit, (128 + number,))
            last.daemon = True
            last.start()
            loop.call_soon_threadsafe(self.exit, None, 128 + number)

        # Python's own handlers, for a loop that waits for a dead terminal runs none of its.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._handlers[number] = signal.signal(number, told_to_end)

    @work(exclusive=True)
    async def _follow_server(self) -> None:
        async with contextlib.aclosing(self.client.follow_status()) as news:
            async for each in news:
                self.post_message(self.Seen(each))

    def on_lab_app_seen(self, message: Seen) -> None:
        """Take what the server told."""
        news, before = message.news, self.connection.state
        if isinstance(news, Lost):
            self.connection = Connection(state="lost", reason=news.reason)
            if before == "connected":
                self.notify(f"{news.reason}; asking again until it is back", severity="error")
        else:
            self.history.add(news)
            self.status = news
            self.connection = Connection(state="connected")
            if before == "lost":
                self.notify(f"connected to {self.client.url}")

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's own, and none of what comes from elsewhere steers the terminal."""
        return (*super().get_line_filters(), self._control_filter)

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,  # noqa: ARG002 - never: errors quote what was read
    ) -> None:
        """Show a message as it is."""
        super().notify(message, title=title, severity=severity, timeout=timeout, markup=False)

    @property
    def inks(self) -> Inks:
        """For pictures made of text."""
        return Inks.of(self.theme_variables)

    @property
    def waiting_words(self) -> str:
        """What a screen says while no server was reached yet."""
        return (
            f"{self.connection.words(self.client.url)}\n\n"
            "Start a server in another terminal:\n\noptiq serve --model FOLDER_OR_HUB_ID\n\n"
            "or look around with recorded data: optiq tui --demo\n\n"
            "Quantize (4) and Fine-tune (5) need no server."
        )

    def watch_connection(self, connection: Connection) -> None:
        """Let screens show that what they draw is old."""
        for entry in self.entries:
            for screen in self._screen_stacks.get(entry.name, []):
                screen.set_class(connection.state == "lost", "-lost")

    def _job_changed(self, job: Job) -> None:
        self.job_signal.publish(job)
        if job.state == "finished":
            self.notify(f"{job.title}: done")
        elif job.state in ("failed", "stopped"):
            self.notify(f"{job.title}: {job.error}", severity="error" if job.state == "failed" else "warning")

    async def action_open(self, name: str) -> None:
        """Open a screen; the one that is left goes on."""
        if len(self.screen_stack) == 1:
            await self.switch_mode(name)

    def action_help(self) -> None:
        """Explain the screen that is open."""
        screen = self.screen
        if isinstance(screen, LabScreen):
            pages = "\n".join(f"- `{entry.key}` **{entry.title}**: {entry.about}" for entry in self.entries)
            self.push_screen(
                HelpScreen(
                    f"{screen.HELP_TEXT}\n\n{key_list(screen)}\n\n{pages}\n\n"
                    "Inside a text field use F1 to F6, or Escape first. Ctrl+P finds every action by name."
                )
            )

    async def action_quit(self) -> None:
        """End the dashboard, after asking where jobs would be stopped."""
        if not self.jobs.running:
            self.exit()
            return
        if isinstance(self.screen, Question):
            return
        titles = "\n".join(f"  {job.title}" for job in self.jobs.running)
        self.push_screen(
            Question(
                f"These jobs still run:\n{titles}\n\nStop them and leave? The same command later goes on "
                "from where they stop.",
                yes="Stop and leave",
                no="Stay",
            ),
            self._leave,
        )

    def action_help_quit(self) -> None:
        """Ctrl+C: copying is meant in most terminals."""
        self.notify("Ctrl+Q leaves the dashboard")

    def _leave(self, agreed: bool | None) -> None:
        if agreed:
            self.exit()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Every screen, every action that has a key, and the end of every job, by name."""
        yield from super().get_system_commands(screen)
        for entry in self.entries:
            yield SystemCommand(entry.title, entry.about, lambda name=entry.name: self.switch_mode(name))
        for job in self.jobs.running:
            yield SystemCommand(f"Stop {job.title}", "The same command later goes on from there", job.stop)
        for active in shown_bindings(screen):
            # Screens are there by name, and the theme is a command of Textual's.
            if not active.binding.action.startswith(("open(", "change_theme")):
                yield SystemCommand(
                    active.binding.description,
                    f"Key {self.get_key_display(active.binding)}",
                    lambda found=active: self.run_action(found.binding.action, found.node),
                )
