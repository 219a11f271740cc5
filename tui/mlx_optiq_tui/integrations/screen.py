"""Connect clients to the server: their settings to copy or to write, and which of them asked last."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from rich.syntax import Syntax
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.status import ClientStatus, EngineStatus
from mlx_optiq_integrations.client import Client, ConfigFile, all_clients
from mlx_optiq_integrations.facts import ClientFacts, served_facts
from mlx_optiq_integrations.shown import mask
from mlx_optiq_integrations.user_files import Change, UserFiles
from mlx_optiq_tui.client import DEFAULT_URL
from mlx_optiq_tui.integrations.pieces import Piece, pieces_of
from mlx_optiq_tui.lab_screen import EmptyState, LabScreen
from mlx_optiq_tui.question import Question

__all__ = ["IntegrationsScreen"]

_LATELY_SHOWN = 4

_Plan = Callable[[UserFiles, ConfigFile], Change]
_Do = Callable[[UserFiles, Change], Path | None]


class IntegrationsScreen(LabScreen):
    """A list of clients, what the chosen one needs, and who asked lately."""

    HELP_TEXT = """# Integrations

Settings are made for the server that is shown: its address, its model, its context. `c` copies what is shown;
`w` shows what would change in the client's own file and writes it after a yes, with a copy of what was there
beside it; `z` brings that back. A key is hidden here and is in what is copied."""

    CSS = """
    IntegrationsScreen #clients { width: 24; height: 1fr; border: round $panel; }
    IntegrationsScreen #clients:focus { border: round $primary; }
    IntegrationsScreen #piece { width: 1fr; height: 1fr; border: round $panel; padding: 0 1; }
    IntegrationsScreen #about, IntegrationsScreen #text { height: auto; }
    IntegrationsScreen #about { margin-bottom: 1; }
    IntegrationsScreen #lately { height: auto; max-height: 6; padding: 0 1; text-wrap: nowrap; }
    IntegrationsScreen #known { height: 1fr; }
    IntegrationsScreen.-unseen #known { display: none; }
    IntegrationsScreen #waiting { display: none; }
    IntegrationsScreen.-unseen #waiting { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("c", "copy", "Copy"),
        ("w", "write", "Write"),
        ("z", "undo", "Undo"),
        ("n", "next", "Next part"),
    ]

    def __init__(self) -> None:
        super().__init__(classes="-unseen")
        self._clients = list(all_clients().values())
        self._facts: ClientFacts | None = None
        self._part = 0

    def compose_body(self) -> ComposeResult:
        """Clients beside what they need; who asked, below."""
        yield EmptyState(id="waiting")
        with Vertical(id="known"):
            with Horizontal():
                yield OptionList(*(Option(each.title, id=each.name) for each in self._clients), id="clients")
                with VerticalScroll(id="piece", can_focus=True):
                    yield Static(id="about", markup=False)
                    yield Static(id="text")
            yield Static(id="lately", markup=False, classes="live")

    def on_mount(self) -> None:
        """Begin with the first client."""
        self.watch(self.lab, "connection", self._draw_waiting)
        clients = self.query_one(OptionList)
        clients.highlighted = 0
        clients.focus()

    def _draw_waiting(self) -> None:
        self.query_one("#waiting", EmptyState).update(self.lab.waiting_words)

    def status_changed(self, status: EngineStatus | None) -> None:
        """Make the settings anew where the server's facts changed."""
        self.set_class(status is None, "-unseen")
        if status is None:
            return
        lab = self.lab
        url = DEFAULT_URL if lab.is_demo else lab.client.url
        facts = served_facts(status, url, api_key=lab.client.key)
        if facts != self._facts:
            self._facts = facts
            self._draw()
        self.query_one("#lately", Static).update(_lately(status.clients))

    def on_option_list_option_highlighted(self) -> None:
        """Show what that client needs."""
        self._part = 0
        self._draw()

    def _chosen(self) -> Client:
        return self._clients[self.query_one(OptionList).highlighted or 0]

    def _draw(self) -> None:
        if self._facts is None:
            return
        client = self._chosen()
        text = self.query_one("#text", Static)
        about = Text(client.about)
        about.append(f"\n{client.docs}", "dim")
        if client.install:
            about.append(f"\ninstall: {client.install}", "dim")
        for warning in client.warnings(self._facts):
            about.append(f"\n! {warning}", "bold")
        for note in client.notes:
            about.append(f"\n{note}")
        pieces = self._pieces()
        if pieces:
            piece = pieces[self._part % len(pieces)]
            number = f" ({self._part % len(pieces) + 1} of {len(pieces)})" if len(pieces) > 1 else ""
            about.append(f"\n\n{piece.title}{number}", "bold")
            shown = mask(piece.text.rstrip("\n"), self._facts)
            text.update(Syntax(shown, piece.language, theme="ansi_dark", word_wrap=True))
        else:
            text.update("")
        self.query_one("#about", Static).update(about)

    def _pieces(self) -> tuple[Piece, ...]:
        assert self._facts is not None
        try:
            return pieces_of(self._chosen(), self._facts)
        except OptiqError as error:
            self.notify(str(error), severity="error")
            return ()

    def _piece(self) -> Piece | None:
        pieces = self._pieces() if self._facts is not None else ()
        return pieces[self._part % len(pieces)] if pieces else None

    def action_next(self) -> None:
        """Show the client's next file or snippet."""
        self._part += 1
        self._draw()

    def action_copy(self) -> None:
        """Copy what is shown, with the key."""
        piece = self._piece()
        if piece is not None:
            self.app.copy_to_clipboard(piece.text)
            self.notify(f"{piece.title} is copied")

    def action_write(self) -> None:
        """Show what would change in the client's file; write it after a yes."""
        self._change("write", UserFiles.planned, UserFiles.write)

    def action_undo(self) -> None:
        """Show what bringing back the former file would change; do it after a yes."""
        self._change("undo", UserFiles.planned_undo, UserFiles.undo)

    def _change(self, what: str, plan: _Plan, do: _Do) -> None:
        piece = self._piece()
        if piece is None or piece.file is None:
            self.notify("this has no file of its own to write to: copy it", severity="warning")
            return
        if self.lab.is_demo:
            self.notify("the recording is no server to connect to: nothing is written", severity="warning")
            return
        files = UserFiles(os.environ, Path.home())
        try:
            change = plan(files, piece.file)
        except OptiqError as error:
            self.notify(str(error), severity="error")
            return
        if change.is_empty:
            self.notify(f"{change.path} is like that already")
            return
        assert self._facts is not None
        question = f"{change.path}\n\n{mask(change.diff, self._facts)}"
        self.app.push_screen(
            Question(question, yes="Write" if what == "write" else "Bring back"),
            lambda agreed: self._done(files, change, do) if agreed else None,
        )

    def _done(self, files: UserFiles, change: Change, do: _Do) -> None:
        try:
            backup = do(files, change)
        except OptiqError as error:
            self.notify(str(error), severity="error")
            return
        kept = f"; what was there is in {backup}" if backup else ""
        self.notify(f"{change.path} is {'written' if change.after is not None else 'removed'}{kept}")


def _lately(clients: tuple[ClientStatus, ...]) -> Text:
    """Who asked last, newest first."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("asked lately", "bold")
    if not clients:
        text.append("  nobody yet", "dim")
    for each in clients[:_LATELY_SHOWN]:
        ago = f"{each.last_seen_s:.0f} s" if each.last_seen_s < 100 else f"{each.last_seen_s / 60:.0f} min"
        requests = "1 request" if each.requests == 1 else f"{each.requests} requests"
        text.append(f"\n  {each.name:<20} {each.dialect:<10} {requests}, {ago} ago")
    return text
