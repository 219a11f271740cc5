"""Progress on stderr, one result on stdout."""

import argparse
import io
import json

import pytest

from mlx_optiq_ext.cli.console import Console, format_table
from mlx_optiq_ext.progress_line import ProgressLine, format_duration
from mlx_optiq_ext.types.progress import Progress
from mlx_optiq_ext.types.quant import Choice


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _play(console: Console, clock: _Clock, total: int, step_s: float, stage: str = "measure") -> None:
    for done in range(total + 1):
        console.progress(Progress(stage=stage, done=done, total=total, detail=f"block {done}"))
        clock.now += step_s


def test_terminal_redraws_one_line_and_ends_it() -> None:
    err, clock = _Terminal(), _Clock()
    _play(Console(err=err, clock=clock), clock, total=4, step_s=2.0)
    frames = err.getvalue().split("\r\x1b[2K")[1:]
    assert len(frames) == 5
    assert [frame.count("\n") for frame in frames] == [0, 0, 0, 0, 1]
    assert "2/4" in frames[2]
    assert "0.5/s, 4 s left" in frames[2]
    assert "block 2" in frames[2]
    assert "████" in frames[4]
    assert "8 s" in frames[4]


def test_work_of_an_earlier_run_is_announced_and_does_not_count_as_pace() -> None:
    """80 replayed steps in a second, then 4 of 2 s each: 16 left take 32 s and not a few."""
    err, clock = _Terminal(), _Clock()
    console = Console(err=err, clock=clock)
    note = "resuming: 80 of 100 tensors measured already, from .s.journal"
    console.progress(Progress(stage="measure", done=0, total=100, note=note))
    for done in range(1, 81):
        clock.now += 1 / 80
        console.progress(Progress(stage="measure", done=done, total=100, replayed=done))
    assert "left" not in err.getvalue()
    for done in range(81, 85):
        clock.now += 2.0
        console.progress(Progress(stage="measure", done=done, total=100, replayed=80))
    assert err.getvalue().startswith(f"{note}\n")
    assert "84/100  0.5/s, 32 s left" in err.getvalue()


def test_terminal_is_not_redrawn_faster_than_ten_times_a_second() -> None:
    err, clock = _Terminal(), _Clock()
    _play(Console(err=err, clock=clock), clock, total=1000, step_s=0.001)
    assert err.getvalue().count("\r") <= 13


def test_a_line_never_wraps_on_a_narrow_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    err = _Terminal()
    Console(err=err).progress(Progress(stage="measure", done=0, total=9, detail="x" * 200))
    assert len(err.getvalue().removeprefix("\r\x1b[2K")) == 39


def test_elsewhere_lines_are_sparse_and_plain() -> None:
    err, clock = io.StringIO(), _Clock()
    console = Console(err=err, clock=clock)
    _play(console, clock, total=100, step_s=1.0)
    _play(console, clock, total=2, step_s=0.1, stage="write")
    lines = err.getvalue().splitlines()
    assert "\r" not in err.getvalue()
    assert "\x1b" not in err.getvalue()
    assert [line.split()[0] for line in lines] == ["measure"] * 8 + ["write"] * 2


def test_an_end_is_said_once_and_a_stage_that_begins_again_anew() -> None:
    err, clock = io.StringIO(), _Clock()
    console = Console(err=err, clock=clock)
    for done, total in ((1, 2), (2, 2), (2, 2), (1, 3), (3, 3)):
        console.progress(Progress(stage="score", done=done, total=total))
        clock.now += 4.0
    lines = err.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/2", "2/2", "1/3", "3/3"]
    assert "4 s" in lines[1]
    assert "4 s" in lines[3]  # of the second round alone


def test_rate_after_a_resume_counts_only_what_was_done_now() -> None:
    err, clock = io.StringIO(), _Clock()
    console = Console(err=err, clock=clock)
    console.progress(Progress(stage="measure", done=50, total=100))
    clock.now = 20.0
    console.progress(Progress(stage="measure", done=60, total=100))
    assert "0.5/s, 1:20 left" in err.getvalue().splitlines()[-1]


def test_quiet_draws_nothing() -> None:
    err = io.StringIO()
    _play(Console(err=err, quiet=True), _Clock(), total=3, step_s=1.0)
    assert err.getvalue() == ""


def test_result_is_text_or_exactly_one_json_document() -> None:
    for json_output in (False, True):
        out, err = io.StringIO(), io.StringIO()
        console = Console(json_output=json_output, out=out, err=err)
        console.progress(Progress(stage="score", done=1, total=1))
        console.note("a note")
        console.result({"choice": Choice(bits=4, group_size=64)}, "four bits")
        if json_output:
            assert json.loads(out.getvalue()) == {"choice": {"bits": 4, "group_size": 64, "mode": "affine"}}
        else:
            assert out.getvalue() == "four bits\n"
        assert "a note\n" in err.getvalue()


def test_note_does_not_land_in_the_middle_of_a_progress_line() -> None:
    err = _Terminal()
    console = Console(err=err)
    console.progress(Progress(stage="write", done=0, total=2))
    console.note("disk is slow")
    assert err.getvalue().endswith("\ndisk is slow\n")


def test_a_line_that_is_left_open_is_ended() -> None:
    err = _Terminal()
    with ProgressLine(err, prefix="[optiq] ") as line:
        line(Progress(stage="write", done=0, total=2))
        assert not err.getvalue().endswith("\n")
    assert err.getvalue().startswith("\r\x1b[2K[optiq] write")
    assert err.getvalue().endswith("0/2\n")


def test_console_follows_the_arguments() -> None:
    assert Console.from_args(argparse.Namespace(json=True, quiet=False)).json_output
    assert not Console.from_args(argparse.Namespace()).json_output


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_table_aligns_names_left_and_numbers_right() -> None:
    table = format_table(["model", "bpw"], [["ours", "5.00"], ["uniform 4g64", "12.50"]], title="Scores")
    assert table.splitlines() == [
        "Scores",
        "model           bpw",
        "────────────  ─────",
        "ours           5.00",
        "uniform 4g64  12.50",
    ]


def test_table_without_rows_still_shows_its_head() -> None:
    assert format_table(["model", "bpw"], []).splitlines()[0] == "model  bpw"


def test_progress_for_programs_is_json_lines_with_the_time_left() -> None:
    err, clock = io.StringIO(), _Clock()
    console = Console(err=err, clock=clock, progress_json=True)
    console.note("8 units are pinned")
    _play(console, clock, total=4, step_s=2.0)
    lines = [json.loads(line) for line in err.getvalue().splitlines()]
    assert lines[0] == {"note": "8 units are pinned"}
    assert [line["done"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    assert lines[1]["seconds_left"] is None
    assert lines[3] == {
        "stage": "measure",
        "done": 2,
        "total": 4,
        "detail": "block 2",
        "replayed": 0,
        "seconds": 4.0,
        "seconds_left": 4.0,
        "values": {},
    }


def test_progress_for_programs_is_at_most_ten_lines_a_second() -> None:
    err, clock = io.StringIO(), _Clock()
    _play(Console(err=err, clock=clock, progress_json=True), clock, total=1000, step_s=0.001)
    done = [json.loads(line)["done"] for line in err.getvalue().splitlines()]
    assert done[0] == 0
    assert done[-1] == 1000
    assert len(done) <= 12


def test_figures_go_to_programs_as_numbers() -> None:
    err = io.StringIO()
    Console(err=err, progress_json=True).progress(
        Progress(stage="train", done=1, total=2, values={"loss": 1.5})
    )
    assert json.loads(err.getvalue())["values"] == {"loss": 1.5}


def test_findings_are_json_for_programs_and_text_for_people() -> None:
    shown: dict[str, str] = {}
    for name, options in {
        "program": {"progress_json": True, "quiet": True},
        "people": {},
        "quiet": {"quiet": True},
    }.items():
        err = io.StringIO()
        Console(err=err, **options).finding({"ranks": {"a": 4}}, "a  4")
        shown[name] = err.getvalue()
    assert shown == {"program": '{"ranks":{"a":4}}\n', "people": "a  4\n", "quiet": ""}
