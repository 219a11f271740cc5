"""Where an answer is in its reasoning, token by token, and when the budget closes it."""

import pytest

from mlx_optiq_ext.engine.reasoning import BUDGETS, ReasoningTrack, budget_of
from mlx_optiq_ext.types.chat import ReasoningOptions

_START, _END = (1, 2), (8, 9)


def _states(track: ReasoningTrack, tokens: list[int]) -> list[str]:
    states = []
    for token in tokens:
        track.feed(token)
        states.append(track.state[0])
    return states


def _track(*, is_open: bool = False, budget: int | None = None) -> ReasoningTrack:
    return ReasoningTrack(_START, _END, is_open=is_open, budget=budget)


def test_reasoning_opens_at_the_beginning_only() -> None:
    assert _states(_track(), [1, 2, 5, 8, 9, 1, 2]) == list("biiiaaa")
    assert _states(_track(), [5, 1, 2]) == list("aaa")
    assert _states(_track(), [1, 5]) == list("ba")
    assert ReasoningTrack((), (), is_open=False, budget=None).state == "after"
    assert ReasoningTrack((), _END, is_open=True, budget=None).state == "inside"
    assert ReasoningTrack((), _END, is_open=False, budget=None).state == "after"


def test_an_end_that_begins_twice_is_found() -> None:
    assert _states(_track(is_open=True), [8, 8, 9]) == list("iia")
    three = ReasoningTrack((), (4, 4, 5), is_open=True, budget=None)
    assert _states(three, [4, 4, 4, 5]) == list("iiia")


def test_the_budget_forces_what_is_missing_of_the_end() -> None:
    track = _track(is_open=True, budget=2)
    assert (track.forced, track.left) == (None, 2)
    _states(track, [5, 8])
    assert (track.forced, track.left) == (9, 0)
    track.feed(9)
    assert (track.state, track.forced, track.left) == ("after", None, None)


def test_no_budget_never_forces_and_never_asks_to_look() -> None:
    track = _track(is_open=True)
    _states(track, [5] * 100)
    assert (track.forced, track.left) == (None, None)


def test_the_opening_is_not_counted() -> None:
    track = _track(budget=1)
    assert track.left == 3
    _states(track, [1, 2])
    assert (track.forced, track.left) == (None, 1)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (ReasoningOptions(), None),
        (ReasoningOptions(budget=7), 7),
        (ReasoningOptions(budget=7, effort="high"), 7),
        (ReasoningOptions(budget=-1), 0),
        (ReasoningOptions(effort="minimal"), 0),
        (ReasoningOptions(effort="xhigh"), None),
    ],
)
def test_a_budget_is_what_was_said_or_what_the_effort_stands_for(
    options: ReasoningOptions, budget: int | None
) -> None:
    assert budget_of(options) == budget
    known = [each for each in BUDGETS.values() if each is not None]
    assert known == sorted(known)
