"""Which candidate is accepted: decided by paired windows, and said in the reason."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_optiq_ext.convert import kv_accept
from mlx_optiq_ext.convert.kv_accept import Scored, accept, compare_candidates, loss_notes
from mlx_optiq_ext.eval.kv_score import CacheNumbers
from mlx_optiq_ext.kv.allocate import CacheCandidate
from mlx_optiq_ext.measure.sessions import Sessions
from mlx_optiq_ext.types.kv import KVConfig, KVScore
from mlx_optiq_ext.types.progress import ignore_progress
from mlx_optiq_ext.types.quant import KEEP, CalibrationInfo, Choice

FOUR = Choice(bits=4, group_size=64)
HARD = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 8.0])
"""How hard each window is for every storage: far more than storages differ."""


def candidate(label: str, *, is_uniform: bool = False, choice: Choice = FOUR) -> CacheCandidate:
    return CacheCandidate(
        label=label, choices={("0", "k"): choice}, bits_per_number=4.5, predicted=0.1, is_uniform=is_uniform
    )


def numbers(divergence: Any) -> CacheNumbers:
    values = np.asarray(divergence, dtype=np.float64)
    return CacheNumbers(values, np.full(len(values), 0.9), values, 64)


def scored(label: str, *lengths: Any, is_uniform: bool = False) -> Scored:
    return Scored(candidate(label, is_uniform=is_uniform), KVConfig(layers=()), tuple(map(numbers, lengths)))


@pytest.mark.parametrize(
    ("shift", "accepted", "words"),
    [
        (np.full(6, -0.1) + 0.01 * np.arange(6), "layered", ": better"),
        (
            np.array([-1.0, 0.8, -0.9, 0.9, -0.7, 0.7]),
            "layered",
            "not distinguishable, only its mean is lower",
        ),
        (np.array([1.0, -0.8, 0.9, -0.9, 0.7, -0.7]), "pair", "has no lower divergence"),
        (np.full(6, 0.1) + 0.01 * np.arange(6), "pair", ": worse"),
    ],
)
def test_paired_windows_decide_and_the_reason_says_how_surely(
    shift: np.ndarray, accepted: str, words: str
) -> None:
    entries = [scored("pair", HARD, is_uniform=True), scored("layered", HARD + shift)]
    verdict = accept(sorted(entries, key=lambda entry: entry.divergence.mean))
    assert verdict.accepted.candidate.label == accepted
    assert words in verdict.reason


def test_every_length_weighs_alike_however_many_windows_it_has() -> None:
    # Better on the one long window by more than worse on each of five short ones.
    layered = scored("layered", HARD[:5] + 0.1, HARD[:1] - 0.2)
    verdict = accept([layered, scored("pair", HARD[:5], HARD[:1], is_uniform=True)])
    assert verdict.accepted is layered


def test_three_windows_tell_nothing_of_chance() -> None:
    entries = [scored("layered", HARD[:3] - 0.1), scored("pair", HARD[:3], is_uniform=True)]
    assert "3 windows cannot tell whether by chance" in accept(entries).reason


def test_one_kind_alone_is_accepted_for_what_it_is() -> None:
    assert "gives the same" in accept([scored("pair", HARD, is_uniform=True)]).reason
    assert "no uniform pair fits" in accept([scored("layered", HARD)]).reason
    exact = [scored("pair", 0 * HARD, is_uniform=True), scored("layered", 0 * HARD)]
    assert accept(exact).reason == "pair: no divergence at all"


def sessions(**counts: int) -> Sessions:
    """Windows whose only token is their number, by length."""
    windows = {int(name[1:]): np.arange(count, dtype=np.int32)[:, None] for name, count in counts.items()}
    info = CalibrationInfo(source="x", sha256="", num_tokens=0, num_windows=0, domains=())
    return Sessions(windows=windows, info=info)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Label → numbers of the windows it ran on; a label's first word is its divergence above the window's."""
    seen: dict[str, list[int]] = {}

    def score_caches(_: Any, tokens: np.ndarray, named: Any, **__: Any) -> tuple[CacheNumbers, ...]:
        found = [numbers(0 * tokens[:, 0])]
        for entry in named:
            seen.setdefault(entry.label, []).extend(int(number) for number in tokens[:, 0])
            wobble = 0.01 * (tokens[:, 0] // 2 % 2)
            found.append(numbers(HARD[tokens[:, 0] % 6] + float(entry.label.split()[0]) + wobble))
        return tuple(found)

    monkeypatch.setattr(kv_accept, "score_caches", score_caches)
    return seen


def compare(found: list[CacheCandidate], text: Sessions) -> tuple[Scored, ...]:
    configs = [KVConfig(layers=())] * len(found)
    return compare_candidates(mx, found, configs, text, ignore_progress)  # type: ignore[arg-type]


def test_what_is_clearly_worse_than_the_best_of_its_kind_runs_on_half_of_the_windows(
    runs: dict[str, list[int]],
) -> None:
    found = [
        candidate("0.5 pair", is_uniform=True),
        candidate("0.9 pair", is_uniform=True),
        candidate("0.0 layered"),
        candidate("0.3 layered"),
    ]
    entries = compare(found, sessions(_64=9, _256=4))
    # The best pair stays, though a layered storage is clearly better.
    assert [entry.candidate.label for entry in entries] == ["0.0 layered", "0.5 pair"]
    assert sorted(runs["0.9 pair"]) == sorted([0, 2, 4, 6, 8, 0, 2])
    assert sorted(runs["0.5 pair"]) == sorted([*range(9), *range(4)])
    for entry in entries:
        assert [len(part.divergence) for part in entry.numbers] == [9, 4]


def test_few_windows_leave_nobody_out(runs: dict[str, list[int]]) -> None:
    found = [candidate("0.5 pair", is_uniform=True), candidate("0.9 pair", is_uniform=True)]
    entries = compare(found, sessions(_64=3, _256=1))
    assert len(entries) == 2
    assert [len(part.divergence) for part in entries[0].numbers] == [3, 1]
    assert sorted(runs["0.9 pair"]) == [0, 0, 1, 2]


def test_nothing_saved_and_much_lost_are_said() -> None:
    score = KVScore(label="", bits_per_number=2.5, divergence=0.7, top1=0.55)
    (much,) = loss_notes(candidate(""), score)
    assert "2 times less likely with every token" in much
    assert "45% of positions" in much
    assert loss_notes(candidate(""), KVScore(label="", bits_per_number=4.5, divergence=0.05)) == ()
    (nothing,) = loss_notes(candidate("", choice=KEEP), KVScore(label="", bits_per_number=16, divergence=0.0))
    assert "nothing is saved" in nothing
