"""The monitor: series, pictures, filter, panels; over a recording, and over a real engine."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support_engine import ready_status
from support_http import live
from support_serving import engine_on, greedy, spec_of, tiny_folder
from support_tui import WIDE, demo_lab, lab_at, piloted, screen_text, until
from textual.pilot import Pilot
from textual.widgets import DataTable

from mlx_optiq_ext.types.port import LogLine
from mlx_optiq_ext.types.status import EngineStatus, LayerBytes, RowStatus
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.history import History
from mlx_optiq_tui.monitor.log_panel import matches
from mlx_optiq_tui.monitor.pictures import kv_picture, memory_picture, totals_picture, waiting_words
from mlx_optiq_tui.themes import Inks
from mlx_optiq_tui.widgets.marks import Part, columns, share_bar, sparkline

INKS = Inks(accent="#0000ff", good="#0000ff", bad="bold #ff0000")


def _row(tokens: int, **changed: Any) -> RowStatus:
    values: dict[str, Any] = {
        "id": "a",
        "model": "m",
        "adapter": None,
        "state": "decode",
        "session": "s",
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "prefilled_tokens": 9,
        "completion_tokens": tokens,
        "tokens_per_s": 1.0,
        "age_s": 1.0,
    }
    return RowStatus(**{**values, **changed})


def _status(uptime_s: float, *rows: RowStatus, **changed: Any) -> EngineStatus:
    return EngineStatus(state="ready", version="0", uptime_s=uptime_s, models=(), rows=rows, **changed)


def test_a_rows_own_speed_is_that_between_two_points() -> None:
    history = History()
    for uptime_s, tokens in ((1.0, 0), (2.0, 10), (2.1, 11), (4.0, 50)):
        history.add(_status(uptime_s, _row(tokens)))
    assert list(history.rows["a"]) == [10.0, 20.0]
    history.add(_status(5.0))
    assert history.rows == {}


def test_each_request_gives_one_time_to_its_first_token() -> None:
    history = History()
    history.add(_status(1.0, _row(1, first_token_s=0.5)))
    history.add(_status(1.2, _row(1, first_token_s=0.5), _row(1, id="b", first_token_s=0.25)))
    assert list(history.first_token_s) == [0.5, 0.25]


def test_series_begin_anew_with_the_server() -> None:
    history = History()
    history.add(_status(100.0, decode_tokens_per_s=5.0))
    history.add(_status(1.0, decode_tokens_per_s=7.0))
    assert list(history.decode) == [7.0]


def test_sparklines_scale_to_their_largest_value_and_show_the_newest() -> None:
    assert sparkline([9.0, 0.0, 4.0, 8.0], 3) == " ▄█"
    assert sparkline([1.0], 3, most=8.0) == "  ▁"
    assert sparkline([], 2) == "  "
    assert sparkline([0.001, 100.0], 2) == "▁█"


def test_a_bar_is_filled_by_its_parts_against_the_whole() -> None:
    parts = [Part(label="a", value=2, shown="2", color=""), Part(label="b", value=1, shown="1", color="")]
    assert share_bar(parts, 4, 8).plain == "████▓▓··"
    assert share_bar(parts, 1, 6).plain == "████▓▓"


def test_columns_stand_side_by_side() -> None:
    assert columns([2.0, 1.0], ["", ""], 2, 2).plain == "█   \n█ █ "


def test_kv_columns_name_their_bits_and_full_precision() -> None:
    layers = [
        LayerBytes(name="0", nbytes=2000, k_bits=4.5, v_bits=3.5),
        LayerBytes(name="1", nbytes=8000),
    ]
    lines = kv_picture(layers, 40, 6).plain.splitlines()
    assert "2 layers, at most 8 kB (layer 1)" in lines[0]
    assert lines[-2].split() == ["4", "F"]
    assert lines[-1].strip() == "█ 4 bits  █ F full precision"


def test_layers_that_do_not_fit_side_by_side_are_drawn_in_bands() -> None:
    layers = [LayerBytes(name=str(k), nbytes=1000, k_bits=4.0) for k in range(50)]
    lines = kv_picture(layers, 20, 12).plain.splitlines()
    assert all(len(line.rstrip()) <= 47 for line in lines)
    assert [line for line in lines if set(line.strip()) == {"4"}] == ["4" * 20, "4" * 20, "4" * 10]


def test_memory_and_failures_are_said_in_words() -> None:
    status = _status(1.0, memory_limit_nbytes=10**9, memory_nbytes=5 * 10**8, weights_nbytes=4 * 10**8)
    assert "500.0 MB of 1.00 GB" in memory_picture(status, 40).plain
    failing = totals_picture(replace(status, requests_finished={"stop": 2, "Overloaded": 1}), INKS)
    assert "1 Overloaded, 2 stop" in failing.plain
    styles = [
        str(span.style) for span in failing.spans if "Overloaded" in failing.plain[span.start : span.end]
    ]
    assert styles == ["bold #ff0000"]


@pytest.mark.parametrize(
    ("words", "found"), [("", True), ("warning ROW", True), ("row error", False), ("ended row", True)]
)
def test_the_filter_wants_every_word_in_any_case(words: str, found: bool) -> None:
    assert matches(LogLine(number=1, time=0.0, level="WARNING", text="Row 7 ended"), words) is found


def test_panels_come_to_the_front_in_a_small_terminal() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: app.screen.query_one("#rows", DataTable).row_count == 3)
        for key, panel in (("k", "caches"), ("l", "log"), ("r", "rows")):
            await pilot.press(key)
            await pilot.pause()
            shown = [each.id for each in app.screen.query("#panels > *") if each.display]
            assert shown == [panel]
        assert "3 running, 0 waiting" in screen_text(app)

    piloted(demo_lab(), script)


def test_all_panels_show_in_a_large_terminal_and_the_log_is_filtered() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "started dialect=openai" in screen_text(app))
        assert all(each.display for each in app.screen.query("#panels > *"))
        await pilot.press("slash", *"Cached=180")
        await until(pilot, lambda: "started dialect=openai" not in screen_text(app))
        assert "out=48" in screen_text(app)
        await pilot.press("escape", "r")
        assert app.focused is not None
        assert app.focused.id == "rows"

    piloted(demo_lab(), script, WIDE)


def test_a_real_engine_is_shown_while_it_answers(tmp_path: Path) -> None:
    engine = engine_on(spec_of(tiny_folder(tmp_path / "tiny")))
    try:
        with live(engine) as url:

            async def script(pilot: Pilot[Any], app: LabApp) -> None:
                for first in range(8):
                    engine.submit(greedy((first, 2, 3), max_tokens=2000), lambda event: None)
                table = app.screen.query_one("#rows", DataTable)
                await until(
                    pilot,
                    lambda: any("decode" in table.get_row_at(k) for k in range(table.row_count)),
                )
                assert app.status is not None
                assert app.status.models[0].id == "tiny"
                await until(pilot, lambda: max(app.history.decode) > 0)

            piloted(lab_at(url), script)
    finally:
        engine.close()


def test_what_those_in_the_queue_wait_for_is_said() -> None:
    tiny = ready_status().models[0].id
    waits = _row(0, model=tiny, state="queued")
    runs = _row(3, model=tiny)

    def words(*rows: RowStatus, max_rows: int = 4) -> str:
        return waiting_words(replace(ready_status(), rows=rows, max_rows=max_rows))

    assert words(runs, waits, max_rows=1) == "for a free row"
    assert words(runs, waits) == "for memory"
    assert words(runs, replace(waits, prompt_tokens=0)) == "being read"
    other = replace(waits, model="org/other")
    assert words(runs, other) == "for org/other to be loaded"
    assert words(runs, other, other, waits) == "for org/other to be loaded, 1 behind"
