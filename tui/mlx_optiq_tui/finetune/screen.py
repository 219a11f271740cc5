"""Fine-tune: write a data set, plan a training, watch it, mount what comes out.

Holds the jobs that were started; the panes draw. Training is our own command: it goes on when the screen is
left, and from where it was stopped.
"""

import tempfile
from pathlib import Path
from typing import ClassVar

import msgspec
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import TabbedContent, TabPane

from mlx_optiq_ext.errors import OptiqError, UsageError
from mlx_optiq_ext.hub.adapters import is_hub_id
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.finetune.course import Course
from mlx_optiq_tui.finetune.data_pane import DataPane
from mlx_optiq_tui.finetune.plan import Planned, samples_text, train_words
from mlx_optiq_tui.finetune.recorded import recorded_training
from mlx_optiq_tui.finetune.rows import FORMS_OF, template
from mlx_optiq_tui.finetune.run_pane import RunPane
from mlx_optiq_tui.finetune.splits import Split, save_split
from mlx_optiq_tui.finetune.train_pane import TrainPane
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.lab_screen import LabScreen
from mlx_optiq_tui.widgets.job_panel import JobPanel
from mlx_optiq_tui.widgets.option_form import OptionForm
from mlx_optiq_tui.widgets.rank_map import rank_words
from mlx_optiq_tui.widgets.text_page import TextPage
from mlx_optiq_tui.work import Work

__all__ = ["FinetuneScreen"]


class FinetuneScreen(LabScreen):
    """Three panes in the order of the work, and the newest job below them."""

    HELP_TEXT = """# Fine-tune

1. **Data**: `n` adds a row from a template, Enter edits, Delete deletes; `i`, a path and Enter import a file.
   Each row is checked by the rules of training; `w` lists what is wrong. `y` shows a row as the model reads
   it; `g` splits by seed and saves, `c` clears. What is not saved is there again next time.
2. **Train**: base, data, output and options. `k` checks without training: counts, ranks, the first examples.
   `s` trains; stopped with `x`, the same key goes on.
3. **Run**: losses as they come. `u` mounts the adapter into the running server, whose `--adapters-dir` must
   hold it; `f` opens its folder.

Long work goes on when this screen is left."""

    CSS = """
    FinetuneScreen TabbedContent, FinetuneScreen ContentSwitcher, FinetuneScreen TabPane { height: 1fr; }
    FinetuneScreen TabPane { padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "pane('data-tab')", "Data", show=False),
        Binding("t", "pane('train-tab')", "Train", show=False),
        Binding("r", "pane('run-tab')", "Run", show=False),
        ("n", "add", "New row"),
        Binding("i", "import", "Import", show=False),
        Binding("delete,backspace", "delete", "Delete row", show=False),
        Binding("w", "problems", "What is wrong", show=False),
        Binding("c", "clear", "Clear rows", show=False),
        Binding("left_square_bracket", "page(-1)", "Rows before", show=False, key_display="["),
        Binding("right_square_bracket", "page(1)", "Rows behind", show=False, key_display="]"),
        Binding("y", "preview", "As read"),
        ("g", "save", "Save data"),
        ("k", "start('check')", "Check"),
        ("s", "start('train')", "Train"),
        ("x", "stop", "Stop"),
        ("u", "mount", "Mount"),
        Binding("f", "folder", "Open folder", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.course = Course()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def compose_body(self) -> ComposeResult:
        """The panes over the job."""
        with TabbedContent(initial="data-tab"):
            with TabPane("Data (d)", id="data-tab"):
                yield DataPane()
            with TabPane("Train (t)", id="train-tab"):
                yield TrainPane()
            with TabPane("Run (r)", id="run-tab"):
                yield RunPane()
        yield JobPanel()

    def on_mount(self) -> None:
        """Show the recording, where there is nothing else to show."""
        self._work = Work(self.lab.jobs, is_demo=self.lab.is_demo)
        self.query_one(TrainPane).fill("adapter", "adapter")
        self.query_one("#rows").focus()
        if not self.lab.is_demo:
            return
        data = self.query_one(DataPane)
        data.rows += [template(form) for form in FORMS_OF["sft"]]
        data.draw()
        recorded = recorded_training()
        self.query_one(TrainPane).show(recorded.planned)
        for step in recorded.steps:
            self.course.add(step)
        self.query_one(RunPane).show(self.course)

    def on_unmount(self) -> None:
        """Leave no row that was looked at behind."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def status_changed(self, status: EngineStatus | None) -> None:
        """Offer the model that the server has loaded as the base, where its name leads to it from here."""
        loaded = [model.source for model in status.models if model.loaded] if status else []
        if loaded and (is_hub_id(loaded[0]) or Path(loaded[0]).is_dir()):
            self.query_one(TrainPane).fill("base", loaded[0], replace=False)

    @on(DataPane.Saved)
    def _data_saved(self, message: DataPane.Saved) -> None:
        pane = self.query_one(TrainPane)
        pane.fill("data", message.folder)
        pane.query_one(OptionForm).fill("method", message.method)

    @on(TrainPane.Asked)
    async def _train_asked(self, message: TrainPane.Asked) -> None:
        await self.action_start(message.step)

    @on(RunPane.Asked)
    def _run_asked(self, message: RunPane.Asked) -> None:
        {"stop": self.action_stop, "mount": self.action_mount, "folder": self.action_folder}[message.step]()

    async def action_start(self, step: str) -> None:
        """Check what was planned, or train."""
        pane = self.query_one(TrainPane)
        missing = [name for name in ("base", "data", "adapter") if not pane.field(name)]
        if missing:
            self._refuse(f"say {' and '.join(missing)} first (t)")
            return
        await self._start(step, pane.field("data"), pane.field("adapter"))

    async def action_preview(self) -> None:
        """Show the row under the cursor as the model reads it: a dry run over this row alone."""
        data, place = self.query_one(DataPane), self.query_one(DataPane).here
        if place is None or not self.query_one(TrainPane).field("base"):
            self._refuse("choose a row, and say the base model (t)")
            return
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="optiq-preview-")
        folder = Path(self._scratch.name)
        save_split(folder, Split(train=(data.rows[place],)))
        method = () if data.method == "sft" else ("--method", "dpo")
        await self._start("preview", str(folder), str(folder / "adapter"), flags=method)

    async def _start(self, step: str, data: str, out: str, flags: tuple[str, ...] | None = None) -> None:
        pane = self.query_one(TrainPane)
        base = pane.field("base")
        try:
            words = train_words(
                base, data, out, pane.flags if flags is None else flags, dry_run=step != "train"
            )
            job = await self._work.start(step, f"{step.capitalize()} {Path(base).name}", words)
        except UsageError as error:
            self._refuse(str(error))
            return
        if step == "train":
            self.course = Course()
        if step != "preview":
            self.query_one(TabbedContent).active = "run-tab" if step == "train" else "train-tab"
        self.job_changed(job)

    def job_changed(self, job: Job) -> None:
        """Draw our jobs; take what came out of one that is done."""
        step = self._work.step_of(job)
        if step is None:
            return
        self.query_one(JobPanel).show(job)
        if step == "train" and job.progress is not None:
            self.course.add(job.progress)
            self.query_one(RunPane).show(self.course)
        elif step == "check" and job.state == "finished":
            self.query_one(TrainPane).show(msgspec.convert(job.result, Planned))
        elif step == "preview" and job.state == "finished":
            planned = msgspec.convert(job.result, Planned)
            self.app.push_screen(
                TextPage("The row as the model reads it", samples_text(planned.preview.samples))
            )

    def action_stop(self) -> None:
        """Stop our job; it saves what it can go on from."""
        self._work.stop()

    def action_mount(self) -> None:
        """Mount the adapter into the running server, under the name of its folder."""
        folder = Path(self.query_one(TrainPane).field("adapter"))
        if not (folder / "adapter_config.json").is_file():
            self._refuse(f"{folder} holds no adapter yet (s)")
            return
        self._mount(folder.absolute())

    @work(exclusive=True, group="mount")
    async def _mount(self, folder: Path) -> None:
        try:
            adapter = await self.lab.client.mount(folder.name, str(folder))
        except OptiqError as error:
            hint = f"\nA server of this machine takes it with --adapters-dir {folder.parent}"
            self.notify(f"{error}{hint if '--adapters-dir' in str(error) else ''}", severity="error")
            return
        self.notify(f"{adapter.name} is mounted: rank {rank_words(adapter)}")

    def action_folder(self) -> None:
        """Open the adapter's folder with the system's own program."""
        folder = Path(self.query_one(TrainPane).field("adapter")).absolute()
        if folder.is_dir():
            self.notify(f"adapter: {folder}")
            self.app.open_url(folder.as_uri())
        else:
            self._refuse(f"{folder} is not made yet (s)")

    def action_pane(self, name: str) -> None:
        """Open a pane and give it the focus."""
        self.set_focus(None)
        self.query_one(TabbedContent).active = name
        # No text field: the next key would be typed into it.
        target = {"data-tab": "#rows", "train-tab": "#check", "run-tab": "#stop"}[name]
        self.call_after_refresh(self.query_one(target).focus)

    def action_add(self) -> None:
        """Add a row to the data set."""
        self.query_one(TabbedContent).active = "data-tab"
        self.query_one(DataPane).add()

    def action_import(self) -> None:
        """Ask for a file to import."""
        self.query_one(TabbedContent).active = "data-tab"
        self.call_after_refresh(self.query_one("#path").focus)

    def action_delete(self) -> None:
        """Delete the row under the cursor."""
        if self.query_one(TabbedContent).active == "data-tab":
            self.query_one(DataPane).delete()

    def action_problems(self) -> None:
        """List what is wrong with the rows."""
        self.query_one(DataPane).list_problems()

    def action_clear(self) -> None:
        """Give the rows up."""
        if self.query_one(TabbedContent).active == "data-tab":
            self.query_one(DataPane).clear()

    def action_page(self, step: int) -> None:
        """List other rows."""
        self.query_one(DataPane).page(step)

    def action_save(self) -> None:
        """Split the rows and save them."""
        self.query_one(DataPane).save()

    def _refuse(self, words: str) -> None:
        self.notify(words, severity="warning")
