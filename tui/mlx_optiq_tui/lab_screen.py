"""What all screens of the dashboard share: the bar above, the keys below, the server's status as it comes.

Knows no single screen. Subclassed by every screen that ``screens`` names.
"""

from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Static

from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.widgets.top_bar import TopBar

if TYPE_CHECKING:
    from mlx_optiq_tui.app import LabApp

__all__ = ["EmptyState", "LabScreen"]


class EmptyState(Static):
    """Said where there is nothing yet: what is missing, and what to do."""

    DEFAULT_CSS = """
    EmptyState { width: 1fr; height: 1fr; content-align: center middle; text-align: center; padding: 1 2;
                 color: $text-muted; }
    """


class LabScreen(Screen[None]):
    """A screen between bar and footer.

    Subclasses give :meth:`compose_body` and, where they need them, :meth:`status_changed` and
    :meth:`job_changed`. CSS may tell terminals apart by the classes ``-narrow`` (less than 110 columns),
    ``-wide``, ``-short`` (less than 34 lines) and ``-tall``.
    """

    HELP_TEXT: ClassVar[str] = ""
    """Markdown on the help screen, above the list of keys."""
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012 - as textual declares it
    VERTICAL_BREAKPOINTS = [(0, "-short"), (34, "-tall")]  # noqa: RUF012 - as textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "blur", "Leave the field", show=False)]

    @property
    def lab(self) -> "LabApp":
        """The app, with ``client``, ``jobs``, ``status`` and ``is_demo``."""
        return lab_of(self)

    def compose(self) -> ComposeResult:
        """The bar, the body, the keys."""
        yield TopBar()
        yield from self.compose_body()
        yield Footer(compact=True)

    def compose_body(self) -> ComposeResult:
        """The screen's own widgets."""
        yield from ()

    def on_mount(self) -> None:
        """Follow what the app knows; Textual calls this after the screen's own, which must not."""
        self.watch(self.lab, "status", self.status_changed)
        self.lab.job_signal.subscribe(self, self.job_changed)

    def status_changed(self, status: EngineStatus | None) -> None:
        """Draw a snapshot of the server; None while it is not reached."""

    def job_changed(self, job: Job) -> None:
        """Draw a job that went on, began or ended."""

    def action_blur(self) -> None:
        """Take the focus from a text field, so that digits choose screens again."""
        self.set_focus(None)
