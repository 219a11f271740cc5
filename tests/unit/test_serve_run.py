"""A run is cancelled whenever its task is, and tells several jobs apart."""

import asyncio
from collections.abc import Iterator

import pytest
from support_engine import FakeEngine, answer

from mlx_optiq_ext.errors import QueueFull
from mlx_optiq_ext.serve.run import JobFailed, Run
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Accepted, Event, EventSink, Failed, Finished, Started, TextDelta


class Manual(FakeEngine):
    """Tells what the test hands over, when it does."""

    tell: EventSink

    def submit(self, request: Generation, deliver: EventSink) -> str:
        self.tell = deliver
        return "job"

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)


@pytest.mark.parametrize("ticks", range(6))
def test_cancelling_works_at_the_moment_an_event_arrives(ticks: int) -> None:
    engine = Manual()

    async def consume() -> None:
        async with Run(engine, Generation()) as run:
            await run.accepted()
            async for _ in run.events(heartbeat_s=5.0):
                pass

    async def main() -> bool:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        engine.tell(Accepted(prompt_tokens=1, model="m"))
        await asyncio.sleep(0.01)
        engine.tell(TextDelta(text="a"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,), timeout=1.0)
        return task.cancelled()

    assert asyncio.run(main())
    assert engine.cancelled == ["job"]


def _told(engine: FakeEngine, *requests: Generation) -> list[tuple[int, Event] | None]:
    async def main() -> list[tuple[int, Event] | None]:
        async with Run(engine, *requests) as run:
            await run.accepted()
            return [told async for told in run.events()]

    return asyncio.run(main())


def test_each_event_names_its_answer_and_each_answer_keeps_its_order() -> None:
    told = _told(FakeEngine(answer("a", "b"), answer("c")), Generation(), Generation())
    texts = {0: "", 1: ""}
    ends = []
    for each in told:
        assert each is not None
        index, event = each
        if isinstance(event, TextDelta):
            texts[index] += event.text
        elif isinstance(event, Finished):
            ends.append(index)
    assert texts == {0: "ab", 1: "c"}
    assert sorted(ends) == [0, 1]


def test_one_refusal_cancels_the_other_answers() -> None:
    def waiting(request: Generation) -> Iterator[Event | float]:
        yield Started(cached_tokens=0)
        yield 30.0

    def refused(request: Generation) -> Iterator[Event]:
        yield Failed.of(QueueFull("full"))

    engine = FakeEngine(waiting, refused)
    with pytest.raises(JobFailed, match="full"):
        _told(engine, Generation(), Generation())
    assert engine.cancelled == ["job1"]


def test_a_refusal_at_submission_leaves_no_job_behind() -> None:
    class Second(FakeEngine):
        def submit(self, request: Generation, deliver: EventSink) -> str:
            if self.requests:
                raise QueueFull("full")
            return super().submit(request, deliver)

    engine = Second(lambda request: [30.0])
    with pytest.raises(QueueFull):
        _told(engine, Generation(), Generation())
    assert engine.cancelled == ["job1"]
