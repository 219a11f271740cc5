"""Quantize: pick a model, measure it, choose a budget, convert, score, look at the report.

Holds what was picked and the jobs that were started; the panes draw. Work is done by our own commands, which
go on when the screen is left.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import TabbedContent, TabPane

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.quantize import commands
from mlx_optiq_tui.quantize.bits_pane import BitsPane
from mlx_optiq_tui.quantize.convert_pane import ConvertPane
from mlx_optiq_tui.quantize.help import HELP_TEXT
from mlx_optiq_tui.quantize.kv_pane import KVPane
from mlx_optiq_tui.quantize.model_facts import ModelFacts
from mlx_optiq_tui.quantize.model_pane import ModelPane
from mlx_optiq_tui.quantize.pictures import plan_line
from mlx_optiq_tui.quantize.recorded import recorded_table
from mlx_optiq_tui.widgets.job_panel import JobPanel
from mlx_optiq_tui.work import Work

__all__ = ["QuantizeScreen"]


class QuantizeScreen(LabScreen):
    """Panes in the order of the work, and the newest job below them."""

    HELP_TEXT = HELP_TEXT
    CSS = """
    QuantizeScreen TabbedContent { height: 1fr; }
    QuantizeScreen ContentSwitcher { height: 1fr; }
    QuantizeScreen TabPane { padding: 0; height: 1fr; }
    QuantizeScreen.-wide #pictures { layout: grid; grid-size: 2; grid-gutter: 0 2; }
    QuantizeScreen.-narrow BitsPane.-map #curve-box { display: none; }
    QuantizeScreen.-narrow BitsPane.-curve #map-box { display: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("m", "pane('model')", "Model", show=False),
        Binding("b", "pane('bits')", "Bits", show=False),
        Binding("c", "pane('convert')", "Convert", show=False),
        Binding("k", "pane('kv')", "KV cache", show=False),
        ("e", "measure", "Measure"),
        ("v", "view", "Picture"),
        ("f", "target", "Size"),
        ("p", "pin", "Pin"),
        ("d", "edges", "Edges"),
        ("w", "start('convert')", "Convert"),
        ("s", "start('score')", "Score"),
        ("o", "start('report')", "Report"),
        ("y", "copy", "Copy command"),
        ("x", "stop", "Stop"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.facts: ModelFacts | None = None
        self.table: SensitivityTable | None = None
        self.table_file = ""
        self.allocation: Allocation | None = None
        self._options = AllocateOptions()

    def compose_body(self) -> ComposeResult:
        """The panes over the job."""
        with TabbedContent(initial="model"):
            with TabPane("Model (m)", id="model"):
                yield ModelPane()
            with TabPane("Bits (b)", id="bits"):
                yield BitsPane()
            with TabPane("Convert (c)", id="convert"):
                yield ConvertPane()
            with TabPane("KV cache (k)", id="kv"):
                yield KVPane()
        yield JobPanel()

    def on_mount(self) -> None:
        """Show the recording, where there is nothing else to show."""
        self._work = Work(self.lab.jobs, is_demo=self.lab.is_demo)
        if self.lab.is_demo:
            self._open_table("", recorded_table())
        else:
            self.query_one("#source").focus()

    @property
    def model(self) -> str:
        """What commands are given: the model that was picked, or that the table names."""
        if self.facts is not None:
            return self.facts.source
        return self.table.model.source if self.table is not None else ""

    @property
    def model_name(self) -> str:
        """Of the model, for files and titles."""
        return Path(self.model).name or "model"

    @on(ModelPane.Chosen)
    def _model_chosen(self, message: ModelPane.Chosen) -> None:
        facts = message.facts
        self.facts, self.table, self.allocation = facts, None, None
        file = commands.places_of(facts.name, Path.cwd(), 0).table
        self.query_one(BitsPane).clear()
        self.query_one(ModelPane).show_chosen(facts, file)
        self.query_one(KVPane).propose(facts.source, f"{facts.name}-kv")
        if Path(file).is_file():
            self._read_table(file)

    @on(ModelPane.Opened)
    def _table_opened(self, message: ModelPane.Opened) -> None:
        self.facts = None
        self.query_one(ModelPane).show_chosen(None, message.file)
        self._open_table(message.file, message.table)

    @work(exclusive=True, group="read", thread=True)
    def _read_table(self, file: str) -> None:
        try:
            table = read_sensitivity(file)
        except UsageError as error:
            self.app.call_from_thread(self.query_one(ModelPane).say, str(error))
            return
        self.app.call_from_thread(self._open_table, file, table)

    def _open_table(self, file: str, table: SensitivityTable) -> None:
        numel = self.facts.numel if self.facts is not None else 0
        if numel and numel != table.total_numel:
            said = f"{file} is of another model ({table.total_numel:,} weights); name another file"
            self.query_one(ModelPane).say(said)
            return
        self.table, self.table_file, self.allocation = table, file, None
        pane = self.query_one(ModelPane)
        if self.facts is not None:
            pane.say(f"measured: {file}")
        self.query_one(TabbedContent).active = "bits"
        self.query_one(BitsPane).open(table, self.facts, pane.context)

    @on(BitsPane.Chosen)
    def _budget_chosen(self, message: BitsPane.Chosen) -> None:
        self.allocation, self._options = message.allocation, message.options
        if self.allocation is not None:
            line = plan_line(self.model_name, self.allocation, self.table_file)
            places = commands.places_of(self.model_name, Path.cwd(), self.allocation.target_bpw)
            self.query_one(ConvertPane).plan(line, places.out)

    @on(ConvertPane.Renamed)
    def _renamed(self) -> None:
        self.query_one(ConvertPane).show_command(commands.shell_line(self._convert_words()))

    def _convert_words(self) -> tuple[str, ...]:
        """What converts to what was chosen, exactly."""
        out = self.query_one(ConvertPane).out
        return commands.convert_words(self.model, self.table_file, out, self._options)

    @on(ModelPane.Refitted)
    def _refitted(self) -> None:
        pane = self.query_one(ModelPane)
        if pane.facts is not None:
            self.facts = pane.facts
            self.query_one(BitsPane).refit(pane.facts, pane.context)

    @on(KVPane.Asked)
    async def _choose_cache(self) -> None:
        """Measure the KV cache of what is to be served, and choose its bits."""
        pane = self.query_one(KVPane)
        await self._start("kv", f"KV cache of {Path(pane.model).name}", pane.words)

    @on(ModelPane.Measure)
    async def action_measure(self) -> None:
        """Measure the model that was picked, or go on where that was stopped."""
        pane = self.query_one(ModelPane)
        if self.facts is None or self.facts.is_quantized:
            self._refuse("pick a model with unquantized weights first (m)")
            return
        source = self.facts.source
        await self._start(
            "measure",
            f"Measure {self.model_name}",
            lambda: commands.measure_words(source, pane.table_file, pane.flags),
        )

    @on(ConvertPane.Asked)
    async def _asked(self, message: ConvertPane.Asked) -> None:
        await self.action_start(message.step)

    async def action_start(self, step: str) -> None:
        """Convert, score or report what was chosen."""
        pane = self.query_one(ConvertPane)
        if step == "convert":
            if not self._has_chosen():
                return
            words = self._convert_words()
        elif not Path(pane.out).is_dir():
            self._refuse(f"{pane.out or 'no folder'} is not converted yet (w)")
            return
        elif step == "score":
            words = commands.score_words(self.model, pane.out, pane.uniform)
        else:
            words = commands.report_words(pane.out, f"{pane.out.rstrip('/')}.html")
        self.query_one(TabbedContent).active = "convert"
        await self._start(step, f"{step.capitalize()} {Path(pane.out).name}", lambda: words)

    def _has_chosen(self) -> bool:
        """Whether the command is that of the slider's budget; else it is said why not."""
        if self.query_one(BitsPane).is_allocating:
            self._refuse("this budget is still being allocated")
        elif self.allocation is None:
            self._refuse("choose a budget first (b)")
        else:
            return True
        return False

    async def _start(self, step: str, title: str, words: Callable[[], tuple[str, ...]]) -> None:
        try:
            self.job_changed(await self._work.start(step, title, words()))
        except UsageError as error:
            self._refuse(str(error))

    def job_changed(self, job: Job) -> None:
        """Draw our jobs; take what came out of one that is done."""
        step = self._work.step_of(job)
        if step is None:
            return
        self.query_one(JobPanel).show(job)
        if job.state == "finished":
            self._take(step, job)

    def _take(self, step: str, job: Job) -> None:
        result, pane = job.result, self.query_one(ConvertPane)
        if step == "measure":
            self._measured(job.command.words)
        elif step == "convert":
            self.query_one(KVPane).propose(result["out"], result["out"])
            pane.show_conversion(result)
        elif step == "score":
            pane.show_score(result)
        elif step == "kv":
            self.query_one(ModelPane).set_cache_bits(self.query_one(KVPane).show(result))
        else:
            file = Path(job.command.words[-1]).absolute()
            self.notify(f"report: {file}")
            self.app.open_url(file.as_uri())

    def _measured(self, words: Sequence[str]) -> None:
        """Open what was measured, unless another model was picked meanwhile."""
        _, model, _, file, *_ = words
        if self.facts is not None and self.facts.source == model:
            self._read_table(file)
        else:
            self.notify(f"measured: {file}")

    def _refuse(self, words: str) -> None:
        self.notify(words, severity="warning")

    def action_stop(self) -> None:
        """Stop our job; it saves what it can go on from."""
        self._work.stop()

    def action_pane(self, name: str) -> None:
        """Open a pane and give it the focus."""
        self.set_focus(None)
        self.query_one(TabbedContent).active = name
        target = {"model": "#source", "bits": "BudgetSlider", "convert": "#out", "kv": "#kv-model"}[name]
        self.call_after_refresh(self.query_one(target).focus)

    def action_view(self) -> None:
        """Change the picture of the budget."""
        self.query_one(BitsPane).next_view()

    def action_target(self) -> None:
        """Name the budget as a size or a memory."""
        if self.table is not None:
            self.action_pane("bits")
            self.query_one(BitsPane).ask_target()

    def action_pin(self) -> None:
        """Go into the map, to pin what is chosen there."""
        if self.table is not None:
            self.query_one(TabbedContent).active = "bits"
            self.query_one(BitsPane).show_bits()

    def action_edges(self) -> None:
        """Protect embedding, head, first and last block, or no longer."""
        self.query_one(BitsPane).toggle_edges()

    def action_copy(self) -> None:
        """Copy the command that Convert runs."""
        if self._has_chosen():
            line = commands.shell_line(self._convert_words())
            self.app.copy_to_clipboard(line)
            self.notify("copied: " + line)
