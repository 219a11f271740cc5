"""The course of a training as its progress tells it: losses by update, and the figures of the newest one.

Knows progress values and no process. Drawn by ``plot`` and the run pane.
"""

from collections.abc import Mapping

from mlx_optiq_ext.progress_line import format_duration
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_integrations.command import CommandProgress

__all__ = ["Course"]


class Course:
    """What was told so far; steps come in order, and a stage that begins anew changes nothing."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        """Loss of each update that was told."""
        self.valid: dict[int, float] = {}
        """Validation loss, by the update after which it was taken."""
        self.newest: CommandProgress | None = None

    def add(self, step: CommandProgress) -> None:
        """Take a step of a training; steps of other stages are skipped."""
        if step.stage != "train":
            return
        self.newest = step
        values = step.values
        if "loss" in values:
            self.train[step.done] = values["loss"]
        if "validation_loss" in values:
            self.valid[int(values.get("validation_step", step.done))] = values["validation_loss"]

    @property
    def best(self) -> float | None:
        """The lowest validation loss."""
        return min(self.valid.values(), default=None)

    def smooth(self, window: int = 8) -> dict[int, float]:
        """Training loss as a mean over the last updates, so that its way is seen through the noise."""
        steps = sorted(self.train)
        means = {}
        for place, step in enumerate(steps):
            near = [self.train[each] for each in steps[max(place - window + 1, 0) : place + 1]]
            means[step] = sum(near) / len(near)
        return means

    def words(self) -> str:
        """Two lines: how far and how long yet; then the newest figures."""
        step = self.newest
        if step is None:
            return "no update yet"
        left = (
            ""
            if step.seconds_left is None or step.done >= step.total
            else f", {format_duration(step.seconds_left)} left"
        )
        lines = [f"update {step.done} of {step.total}{left}"]
        lines.append(" · ".join(_figures(step.values)))
        return "\n".join(lines)


def _figures(values: Mapping[str, float]) -> list[str]:
    shown = []
    for name, label in (("loss", "loss"), ("validation_loss", "validation"), ("accuracy", "accuracy")):
        if name in values:
            shown.append(f"{label} {values[name]:.4f}")
    if "margin" in values:
        shown.append(f"margin {values['margin']:.3f}")
    if "learning_rate" in values:
        shown.append(f"rate {values['learning_rate']:.2g}")
    if "tokens_per_s" in values:
        shown.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if "peak_memory_nbytes" in values:
        shown.append(f"peak {format_nbytes(values['peak_memory_nbytes'])}")
    return shown
