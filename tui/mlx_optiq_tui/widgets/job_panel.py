"""One job in two lines: what it does, how far it is, how long it takes yet; or why it ended."""

from rich.text import Text
from textual.widgets import Static

from mlx_optiq_ext.progress_line import format_duration
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.themes import Inks

__all__ = ["JobPanel", "job_lines"]

_BAR = 20
_SIGNS = {"running": "⚙", "finished": "✓", "stopped": "◼", "failed": "✕"}


class JobPanel(Static):
    """Shows the newest job of a screen; takes no room before there is one."""

    DEFAULT_CSS = """
    JobPanel { height: auto; max-height: 4; display: none; background: $panel; padding: 0 1; }
    """

    def show(self, job: Job) -> None:
        """Draw a job as it is now."""
        self.display = True
        self.update(job_lines(job, lab_of(self).inks))


def job_lines(job: Job, inks: Inks) -> Text:
    """The lines of a job.

    Args:
        job: Running or ended.
        inks: Of the theme.
    """
    styles = {"finished": inks.good, "failed": inks.bad, "stopped": "dim"}
    text = Text(overflow="ellipsis")
    text.append(f"{_SIGNS[job.state]} {job.title}  ", styles.get(job.state, "bold"))
    step = job.progress
    if job.state != "running":
        text.append(job.error or job.state)
        return text
    if step is None:
        return text.append("starting", "dim")
    filled = round(min(step.done / max(step.total, 1), 1.0) * _BAR)
    text.append(f"{step.stage} {'█' * filled}{'░' * (_BAR - filled)} {step.done}/{step.total}")
    if step.seconds_left is not None:
        text.append(f"  {format_duration(step.seconds_left)} left")
    said = step.detail or (job.command.notes[-1] if job.command.notes else "")
    text.append(f"\n  {said}" if said else "", "dim")
    return text
