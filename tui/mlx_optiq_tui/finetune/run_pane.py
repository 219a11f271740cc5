"""Watch a training: figures, a live plot of its losses, and what can be done with what comes out."""

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Button, Static
from textual_plotext import PlotextPlot

from mlx_optiq_ext.types.palette import parse_hex
from mlx_optiq_tui.finetune.course import Course

__all__ = ["LossPlot", "RunPane"]

_TRAIN, _VALID = parse_hex("#56b4e9"), parse_hex("#e69f00")


class LossPlot(PlotextPlot):
    """Training loss as a smoothed line of dots, validation loss as marked points."""

    def draw(self, course: Course) -> None:
        """Draw the losses that were told so far."""
        plot = self.plt
        plot.clear_data()
        smooth = course.smooth()
        if smooth:
            plot.plot(list(smooth), list(smooth.values()), marker="braille", color=_TRAIN, label="training")
        if course.valid:
            steps = sorted(course.valid)
            losses = [course.valid[step] for step in steps]
            plot.scatter(steps, losses, marker="◆", color=_VALID, label="validation")
        plot.xlabel("update")
        plot.ylabel("loss")
        self.refresh()


class RunPane(Vertical):
    """Figures over the plot."""

    DEFAULT_CSS = """
    RunPane { padding: 0 1; }
    RunPane #figures { height: 2; }
    RunPane LossPlot { height: 1fr; }
    RunPane Horizontal { height: 1; }
    RunPane Button { margin-right: 2; }
    """

    class Asked(Message):
        """A button was pressed: ``stop``, ``mount`` or ``folder``."""

        def __init__(self, step: str) -> None:
            super().__init__()
            self.step = step

    def compose(self) -> ComposeResult:
        """Figures, plot, buttons."""
        yield Static("No training was started yet (s).", id="figures", markup=False)
        yield LossPlot()
        with Horizontal():
            yield Button("Stop (x)", id="stop", compact=True)
            yield Button("Mount (u)", id="mount", compact=True)
            yield Button("Folder (f)", id="folder", compact=True)

    def show(self, course: Course) -> None:
        """Draw the course of a training."""
        self.query_one("#figures", Static).update(course.words())
        self.query_one(LossPlot).draw(course)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Asked(event.button.id or ""))
