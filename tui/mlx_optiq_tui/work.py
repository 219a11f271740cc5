"""The jobs of one screen: which of the dashboard's are its own and what each is for; one at a time.

Knows jobs and no widget. Called by the quantize and the fine-tune screens.
"""

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_tui.jobs import Job, Jobs

__all__ = ["Work"]


class Work:
    """Starts our commands and knows them again.

    Args:
        jobs: All of the dashboard.
        is_demo: Nothing is to be run.
    """

    def __init__(self, jobs: Jobs, *, is_demo: bool) -> None:
        self._jobs, self._is_demo = jobs, is_demo
        self._steps: dict[int, str] = {}
        """What each of our jobs is for, by its number."""

    async def start(self, step: str, title: str, words: tuple[str, ...]) -> Job:
        """Start a command.

        Args:
            step: What it is for.
            title: For people.
            words: Command and arguments.
        Raises:
            UsageError: This is a recording, or one of ours still runs.
        """
        if self._is_demo:
            raise UsageError("this is a recording: nothing is run")
        if self.running:
            raise UsageError("one job at a time: wait, or stop it (x)")
        job = await self._jobs.start(title, words)
        self._steps[job.number] = step
        return job

    def step_of(self, job: Job) -> str | None:
        """What a job is for; None where it is not ours."""
        return self._steps.get(job.number)

    @property
    def running(self) -> list[Job]:
        """Ours that have not ended."""
        return [job for job in self._jobs.running if job.number in self._steps]

    def stop(self) -> None:
        """Ask ours to stop; they save what they can go on from."""
        for job in self.running:
            job.stop()
