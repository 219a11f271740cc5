"""Quantize: pick a model, measure it, choose a budget, convert, score, look at the report.

Holds what was picked and the jobs that were started; the panes draw. Work is done by our own commands, which
go on when the screen is left.
"""

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import TabbedContent, TabPane

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.quantize.bits_pane import BitsPane
from mlx_optiq_tui.quantize.commands import (
    convert_words,
    measure_words,
    places_of,
    report_words,
    score_words,
    shell_line,
)
from mlx_optiq_tui.quantize.convert_pane import ConvertPane
from mlx_optiq_tui.quantize.model_facts import ModelFacts
from mlx_optiq_tui.quantize.model_pane import ModelPane
from mlx_optiq_tui.quantize.recorded import recorded_table
from mlx_optiq_tui.widgets.job_panel import JobPanel

__all__ = ["QuantizeScreen"]


class QuantizeScreen(LabScreen):
    """Three panes in the order of the work, and the newest job below them."""

    HELP_TEXT = """# Quantize

1. **Model**: words and Enter search the Hub (offline: the cache); a folder or a sensitivity file is opened.
   `e` measures; stopped with `x`, the same key goes on from there.
2. **Bits**: move the budget by the arrow keys, Page keys, or mouse. Each move allocates anew; `×` is how much
   further off the best uniform choice within the same budget is predicted. `f` takes a size or a memory in
   place of bits. `p` goes into the map: arrow keys choose, Space reaches further (the module of every block,
   the block), `+` and `-` pin wider and narrower, Delete frees. `d` protects the edges. `v`: other pictures.
3. **Convert**: `w` writes, verifies and scores; `y` copies that command; `s` scores, `o` opens the report.

Long work goes on when this screen is left."""

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
        self._steps: dict[int, str] = {}
        """What each of our jobs is for, by its number."""

    def compose_body(self) -> ComposeResult:
        """The panes over the job."""
        with TabbedContent(initial="model"):
            with TabPane("Model (m)", id="model"):
                yield ModelPane()
            with TabPane("Bits (b)", id="bits"):
                yield BitsPane()
            with TabPane("Convert (c)", id="convert"):
                yield ConvertPane()
        yield JobPanel()

    def on_mount(self) -> None:
        """Show the recording, where there is nothing else to show."""
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
        file = places_of(facts.name, Path.cwd(), 0).table
        said = "Measure it (e): minutes for a small model, hours for a large one. Stopped, it goes on."
        if facts.is_quantized:
            said = "It is quantized already: pick the original weights."
        self.query_one(ModelPane).show_chosen(facts, file, said)
        if Path(file).is_file():
            self._read_table(file)

    @on(ModelPane.Opened)
    def _table_opened(self, message: ModelPane.Opened) -> None:
        self.facts = None
        self.query_one(ModelPane).show_chosen(None, message.file, f"opened {message.file}")
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
        self.table, self.table_file = table, file
        pane = self.query_one(ModelPane)
        if self.facts is not None:
            pane.say(f"measured: {file}")
        self.query_one(TabbedContent).active = "bits"
        self.query_one(BitsPane).open(table, self.facts, pane.context)

    @on(BitsPane.Chosen)
    def _budget_chosen(self, message: BitsPane.Chosen) -> None:
        self.allocation, self._options = message.allocation, message.options
        if self.allocation is None:
            return
        chosen = self.allocation
        words = (
            f"{self.model_name} at {chosen.achieved_bpw:.3f} bits per weight, "
            f"{format_nbytes(chosen.nbytes)}, by {self.table_file or 'a recorded measurement'}"
        )
        places = places_of(self.model_name, Path.cwd(), chosen.target_bpw)
        self.query_one(ConvertPane).plan(words, places.out)

    @on(ConvertPane.Renamed)
    def _renamed(self) -> None:
        self.query_one(ConvertPane).show_command(shell_line(self._convert_words()))

    def _convert_words(self) -> tuple[str, ...]:
        """What converts to what was chosen, exactly."""
        out = self.query_one(ConvertPane).out
        return convert_words(self.model, self.table_file, out, self._options)

    @on(ModelPane.Measure)
    async def action_measure(self) -> None:
        """Measure the model that was picked, or go on where that was stopped."""
        pane = self.query_one(ModelPane)
        if self.facts is None or self.facts.is_quantized:
            self._refuse("pick a model with unquantized weights first (m)")
            return
        try:
            words = measure_words(self.facts.source, pane.table_file, pane.flags)
        except UsageError as error:
            self._refuse(str(error))
            return
        self.table_file = pane.table_file
        await self._start("measure", f"Measure {self.model_name}", words)

    @on(ConvertPane.Asked)
    async def _asked(self, message: ConvertPane.Asked) -> None:
        await self.action_start(message.step)

    async def action_start(self, step: str) -> None:
        """Convert, score or report what was chosen."""
        pane = self.query_one(ConvertPane)
        if step == "convert":
            if self.allocation is None:
                self._refuse("choose a budget first (b)")
                return
            words = self._convert_words()
        elif not Path(pane.out).is_dir():
            self._refuse(f"{pane.out or 'no folder'} is not converted yet (w)")
            return
        elif step == "score":
            words = score_words(self.model, pane.out, pane.uniform)
        else:
            words = report_words(pane.out, f"{pane.out.rstrip('/')}.html")
        self.query_one(TabbedContent).active = "convert"
        await self._start(step, f"{step.capitalize()} {Path(pane.out).name}", words)

    async def _start(self, step: str, title: str, words: tuple[str, ...]) -> None:
        if self.lab.is_demo:
            self._refuse("this is a recording: nothing is run")
            return
        if any(job.state == "running" and job.number in self._steps for job in self.lab.jobs.all):
            self._refuse("one job at a time: wait, or stop it (x)")
            return
        job = await self.lab.jobs.start(title, words)
        self._steps[job.number] = step
        self.job_changed(job)

    def job_changed(self, job: Job) -> None:
        """Draw our jobs; take what came out of one that is done."""
        step = self._steps.get(job.number)
        if step is None:
            return
        self.query_one(JobPanel).show(job)
        if job.state == "finished":
            self._take(step, job)

    def _take(self, step: str, job: Job) -> None:
        result, pane = job.result, self.query_one(ConvertPane)
        if step == "measure":
            self._read_table(self.table_file)
        elif step == "convert":
            if result.get("score"):
                pane.show_score(result["score"])
            else:
                pane.show(f"written to {result['out']}")
        elif step == "score":
            pane.show_score(result)
        else:
            file = Path(job.command.words[-1]).absolute()
            self.notify(f"report: {file}")
            self.app.open_url(file.as_uri())

    def _refuse(self, words: str) -> None:
        self.notify(words, severity="warning")

    def action_stop(self) -> None:
        """Stop our job; it saves what it can go on from."""
        for job in self.lab.jobs.running:
            if job.number in self._steps:
                job.stop()

    def action_pane(self, name: str) -> None:
        """Open a pane and give it the focus."""
        self.set_focus(None)
        self.query_one(TabbedContent).active = name
        target = {"model": "#source", "bits": "BudgetSlider", "convert": "#out"}[name]
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
        if self.allocation is None:
            self._refuse("choose a budget first (b)")
            return
        line = shell_line(self._convert_words())
        self.app.copy_to_clipboard(line)
        self.notify("copied: " + line)
