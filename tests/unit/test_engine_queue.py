"""Turns between sessions, names, counters, the log's last lines."""

import logging

import pytest

from mlx_optiq_ext.engine.adapters import Mounted
from mlx_optiq_ext.engine.counters import Histogram
from mlx_optiq_ext.engine.fair_queue import FairQueue
from mlx_optiq_ext.engine.job import Job
from mlx_optiq_ext.engine.log_ring import LogRing
from mlx_optiq_ext.engine.names import ModelNames
from mlx_optiq_ext.errors import UnknownName, UsageError
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.events import Event, Prefilled, TextDelta


def test_sessions_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert queue.peek() == "a1"
    assert [queue.pop() for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert queue.peek() is None
    with pytest.raises(KeyError):
        queue.pop()


def test_what_may_not_go_is_passed_by_and_keeps_its_place() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1", "c1"):
        queue.push(item[0], item)
    assert queue.take(lambda item: item != "a1") == "b1"
    assert queue.take(lambda item: item == "a2") is None, "a session's second waits for its first"
    assert queue.take(lambda _: True) == "a1"
    assert [queue.pop(), queue.pop()] == ["c1", "a2"]


def test_unwanted_things_leave_the_queue() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in range(6):
        queue.push(f"session {item % 2}", item)
    assert sorted(queue.remove(lambda item: item in (1, 2, 3, 5))) == [1, 2, 3, 5]
    assert len(queue) == 2
    assert sorted(queue) == [0, 4]


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ("org/one", "org/one"),
        ("one", "org/one"),
        ("other/two", "two"),
        ("small", "two"),
        ("gpt-4o", "org/one"),
        ("", "org/one"),
        ("../../etc/passwd", "org/one"),
    ],
)
def test_every_name_reaches_a_model(asked: str, model: str) -> None:
    assert ModelNames(["org/one", "two"], ["small=two"]).resolve(asked) == model


def test_strict_names_refuse_what_they_do_not_know() -> None:
    names = ModelNames(["org/one"], ["claude"], strict=True)
    assert names.resolve("claude") == "org/one"
    assert names.resolve("") == "org/one", "no name is not an unknown one"
    with pytest.raises(UnknownName, match="no model 'gpt-4o'; there are org/one, claude"):
        names.resolve("gpt-4o")


def test_an_alias_of_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--alias a=b: no model 'b'"):
        ModelNames(["one"], ["a=b"])
    with pytest.raises(UsageError, match="--alias '=one' has no name"):
        ModelNames(["one"], ["=one"])


def test_durations_are_counted_by_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 3.0):
        histogram.add(seconds)
    counted = histogram.snapshot()
    assert counted.counts == (2, 1, 1)
    assert (counted.number, counted.total) == (4, pytest.approx(3.65))


def test_the_log_keeps_its_newest_lines_without_tracebacks() -> None:
    ring, logger = LogRing(limit=3), logging.getLogger("test_log_ring")
    logger.addHandler(ring)
    logger.setLevel(logging.INFO)
    try:
        for number in range(4):
            logger.info("line %d", number)
        try:
            raise ValueError("a folder's name")
        except ValueError:
            logger.exception("it failed")
    finally:
        logger.removeHandler(ring)
    assert [line.text for line in ring.lines(0)] == ["line 2", "line 3", "it failed"]
    assert [line.text for line in ring.lines(4)] == ["it failed"]
    assert ring.lines(0)[-1].level == "ERROR"


def test_a_row_tells_how_long_its_first_token_took() -> None:
    told: list[Event] = []
    job = Job("job1", Generation(), told.append, "tiny")
    job.created -= 2.0
    job.emit(Prefilled(done=1, total=1))
    assert job.row().first_token_s is None
    job.emit(TextDelta(text="a"))
    job.emit(TextDelta(text="b"))
    row = job.row()
    assert row.first_token_s is not None
    assert 2.0 <= row.first_token_s <= row.age_s < 60.0
    assert len(told) == 3


def test_a_row_names_the_adapter_that_answers() -> None:
    job = Job("job1", Generation(), lambda event: None, "tiny")
    assert job.row().adapter is None
    job.adapter = Mounted("sql", 1, "", {})
    assert job.row().adapter == "sql"
    job.adapter = Mounted("", 0, "", {})
    assert job.row().adapter is None
