"""The adapters of a server: what is mounted, what can be, their ranks, and their answers side by side."""

from collections.abc import Awaitable
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import DataTable, Static, TabbedContent, TabPane

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.status import AdapterStatus, EngineStatus
from mlx_optiq_tui.adapters.compare import ComparePanel
from mlx_optiq_tui.adapters.mount_form import MountForm, Mounting
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.question import Question
from mlx_optiq_tui.widgets.plain_table import PlainTable
from mlx_optiq_tui.widgets.rank_map import rank_by_bits_map, rank_difference_map, rank_map, rank_words

__all__ = ["AdaptersScreen"]

_COLUMNS = ("", "adapter", "model", "source", "rank", "memory", "base", "requests")
_VIEWS = ("rank", "bits", "difference")
_FITS = {True: "✓ same", False: "✕ other", None: "? not said"}
_NOTHING = (
    "No adapter is mounted. m mounts one: a folder below the server's --adapters-dir, or a Hub id.\n"
    "optiq lora train, or the Fine-tune screen, makes one."
)


class AdaptersScreen(LabScreen):
    """A table, the ranks of the chosen adapter, and a tab that compares two of them."""

    HELP_TEXT = """# Adapters

`●` answers requests that name none; `○` is mounted; `·` can be mounted. `base` says whether the adapter was
trained on these very weights. The map shows its rank by module and block; `v` colours it by the bits of the
layers under it, and then shows where it has more rank than another adapter.

Mounting and unmounting disturb no answer that is running."""

    CSS = """
    AdaptersScreen #table { height: auto; max-height: 50%; }
    AdaptersScreen #ranks { height: 1fr; padding: 1 1 0 1; }
    AdaptersScreen TabbedContent, AdaptersScreen ComparePanel { height: 1fr; }
    AdaptersScreen TabPane { padding: 0; height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("m", "mount", "Mount"),
        ("u", "unmount", "Unmount"),
        ("d", "use", "Default"),
        ("b", "use_base", "Base"),
        ("v", "view", "Ranks"),
        ("c", "compare", "Compare"),
        ("t", "table", "Table"),
    ]

    class Listed(Message):
        """What could be mounted besides."""

        def __init__(self, available: tuple[str, ...]) -> None:
            super().__init__()
            self.available = available

    class Done(Message):
        """A switch was turned, or could not be."""

        def __init__(self, words: str, *, failed: bool = False) -> None:
            super().__init__()
            self.words, self.failed = words, failed

    def __init__(self) -> None:
        super().__init__()
        self._mounted: tuple[AdapterStatus, ...] = ()
        self._available: tuple[str, ...] = ()
        self._view = _VIEWS[0]

    def compose_body(self) -> ComposeResult:
        """Two tabs."""
        with TabbedContent(initial="list"):
            with TabPane("Adapters", id="list"):
                yield PlainTable(id="table", cursor_type="row", classes="live")
                with VerticalScroll(id="ranks", classes="live"):
                    yield Static(_NOTHING, id="map", markup=False)
            with TabPane("Compare", id="compare"):
                yield ComparePanel(id="answers")

    def on_mount(self) -> None:
        """Begin with the table."""
        self.query_one("#table", DataTable).add_columns(*_COLUMNS)
        self.action_table()

    def on_screen_resume(self) -> None:
        """Folders may have come meanwhile."""
        self._list_available()

    @work(exclusive=True, group="list")
    async def _list_available(self) -> None:
        try:
            self.post_message(self.Listed((await self.lab.client.adapters()).available))
        except OptiqError:
            # The bar says that the server is lost; it is asked again when it is back.
            return

    def on_adapters_screen_listed(self, message: Listed) -> None:
        """Show what can be mounted."""
        self._available = message.available
        self._draw()

    def status_changed(self, status: EngineStatus | None) -> None:
        """Draw where something was mounted, taken away or asked."""
        if status is None:
            return
        self.query_one(ComparePanel).show_status(status)
        if status.adapters != self._mounted:
            self._mounted = status.adapters
            self._draw()

    def _draw(self) -> None:
        table = self.query_one("#table", DataTable)
        row = table.cursor_row
        table.clear()
        for each in self._mounted:
            table.add_row(*_cells(each), key=f"mounted {each.model} {each.name}")
        mounted = {each.source for each in self._mounted}
        for source in self._available:
            if source not in mounted:
                table.add_row("·", "", "", source, "", "", "", "", key=f"available {source}")
        table.move_cursor(row=min(row, max(table.row_count - 1, 0)))
        self._draw_ranks()

    def on_data_table_row_highlighted(self) -> None:
        """Show the ranks of that adapter."""
        self._draw_ranks()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self.call_after_refresh(self._draw_ranks)

    def _draw_ranks(self) -> None:
        picture = self.query_one("#map", Static)
        width = picture.content_size.width or 76
        chosen = self._chosen()
        if isinstance(chosen, AdapterStatus):
            picture.update(self._picture(chosen, width))
        else:
            picture.update(f"{chosen} can be mounted: m" if chosen else _NOTHING)

    def _picture(self, chosen: AdapterStatus, width: int) -> Text:
        """The ranks as the view wants them, below a line that says how."""
        if self._view == "rank":
            return Text("rank by module and block\n", "bold").append(rank_map(chosen.ranks, width))
        if self._view == "bits":
            said = Text("rank, on the bits of the base's layers\n", "bold")
            return said.append(rank_by_bits_map(chosen.ranks, chosen.base_bits, width))
        others = [each for each in self._mounted if each is not chosen and each.model == chosen.model]
        if not others:
            return Text("no other adapter of this model is mounted to compare ranks with (v)", "dim")
        other = next((each for each in others if each.is_default), others[0])
        said = Text(f"rank of {chosen.name} less that of {other.name}\n", "bold")
        return said.append(rank_difference_map(chosen.ranks, other.ranks, width))

    def action_view(self) -> None:
        """Ranks; ranks on the base's bits; the difference from another adapter; and again."""
        self._view = _VIEWS[(_VIEWS.index(self._view) + 1) % len(_VIEWS)]
        self._draw_ranks()

    def _chosen(self) -> AdapterStatus | str | None:
        """The adapter under the cursor, or the source of one that is not mounted."""
        row = self.query_one("#table", DataTable).cursor_row
        if row < len(self._mounted):
            return self._mounted[row]
        mounted = {each.source for each in self._mounted}
        left = [source for source in self._available if source not in mounted]
        index = row - len(self._mounted)
        return left[index] if 0 <= index < len(left) else None

    def action_mount(self) -> None:
        """Ask what to mount; the folder under the cursor is offered."""
        chosen = self._chosen()
        status = self.lab.status
        models = [model.id for model in status.models if model.loaded] if status else []
        source = chosen if isinstance(chosen, str) else ""
        self.app.push_screen(MountForm(self._available, models, source), self._mount_it)

    def _mount_it(self, asked: Mounting | None) -> None:
        if asked is not None:
            self.notify(f"mounting {asked.source}")
            mounted = self.lab.client.mount(asked.name, asked.source, asked.model)
            self._switch(mounted, f"{asked.name} is mounted")

    def action_unmount(self) -> None:
        """Ask, then take the adapter under the cursor away."""
        chosen = self._chosen()
        if not isinstance(chosen, AdapterStatus):
            self._say_unmounted(chosen)
            return

        def answered(agreed: bool | None) -> None:
            if agreed:
                gone = self.lab.client.unmount(chosen.name, chosen.model)
                self._switch(gone, f"{chosen.name} is unmounted")

        question = (
            f"Unmount {chosen.name}? Answers that use it go on to their end; new requests cannot name it."
        )
        self.app.push_screen(Question(question, yes="Unmount"), answered)

    def action_use(self) -> None:
        """Let the adapter under the cursor answer where a request names none."""
        chosen = self._chosen()
        if isinstance(chosen, AdapterStatus):
            used = self.lab.client.use(chosen.name, chosen.model)
            self._switch(used, f"{chosen.name} answers where a request names no adapter")
        else:
            self._say_unmounted(chosen)

    def _say_unmounted(self, source: str | None) -> None:
        self.notify(f"{source} is not mounted: m mounts it" if source else "no adapter is mounted")

    def action_use_base(self) -> None:
        """Let the model itself answer where a request names none."""
        chosen = self._chosen()
        model = chosen.model if isinstance(chosen, AdapterStatus) else ""
        self._switch(self.lab.client.use(None, model), "requests that name no adapter get the model itself")

    @work(group="switch")
    async def _switch(self, switching: Awaitable[object], done: str) -> None:
        try:
            await switching
        except OptiqError as error:
            self.post_message(self.Done(str(error), failed=True))
        else:
            self.post_message(self.Done(done))

    def on_adapters_screen_done(self, message: Done) -> None:
        """Say so, and look what can be mounted now."""
        self.notify(message.words, severity="error" if message.failed else "information")
        self._list_available()

    def action_blur(self) -> None:
        """Leave a field; the table keeps the focus, for the keys are about its rows."""
        if self.query_one(TabbedContent).active == "list":
            self.action_table()
        else:
            super().action_blur()

    def action_compare(self) -> None:
        """Write one prompt for two adapters."""
        self.query_one(TabbedContent).active = "compare"
        self.query_one("#prompt").focus()

    def action_table(self) -> None:
        """Go back to the table."""
        self.query_one(TabbedContent).active = "list"
        self.query_one("#table").focus()


def _cells(adapter: AdapterStatus) -> tuple[str, ...]:
    return (
        "●" if adapter.is_default else "○",
        adapter.name,
        adapter.model,
        adapter.source,
        rank_words(adapter),
        format_nbytes(adapter.nbytes),
        _FITS[adapter.fits_base],
        str(adapter.requests),
    )
