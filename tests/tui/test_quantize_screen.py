"""The quantize screen by keys and mouse, on a tiny model with real commands, and on recorded data."""

import os
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support_models import save_model_folder, tiny_model
from support_tui import NARROW, WIDE, demo_lab, lab_at, piloted, until
from textual.pilot import Pilot
from textual.widgets import Button, DataTable, Input, Static, TabbedContent

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.errors import ModelNotFound
from mlx_optiq_ext.formats.kv_config import read_kv_config
from mlx_optiq_ext.formats.sensitivity import read_sensitivity, write_sensitivity
from mlx_optiq_ext.hub.search import FoundModel
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.quantize import bits_pane, model_pane
from mlx_optiq_tui.quantize.bits_pane import BitsPane
from mlx_optiq_tui.quantize.model_pane import ModelPane
from mlx_optiq_tui.quantize.recorded import recorded_table
from mlx_optiq_tui.quantize.screen import QuantizeScreen
from mlx_optiq_tui.quantize.slider import BudgetSlider
from mlx_optiq_tui.widgets.job_panel import JobPanel
from mlx_optiq_tui.widgets.option_form import OptionForm
from mlx_optiq_tui.widgets.top_bar import TopBar

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the dashboard and of what it starts, with a model in it."""
    save_model_folder(tmp_path / "tiny", tiny_model())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(path) for path in sys.path if path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def screen_of(app: LabApp) -> QuantizeScreen:
    assert isinstance(app.screen, QuantizeScreen)
    return app.screen


def text_of(app: LabApp, selector: str) -> str:
    return str(app.screen.query_one(selector, Static).render())


def test_a_model_is_measured_converted_and_its_cache_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = lab_at(NOBODY, "quantize")
    opened: list[str] = []
    monkeypatch.setattr(app, "open_url", lambda url, **_: opened.append(url))

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        await measure_stop_and_go_on(pilot, app)
        assert read_sensitivity(folder / "tiny.sensitivity.json") == screen.table
        at_five = screen.allocation
        await pilot.press("b", "left", "left")
        await until(pilot, lambda: screen.allocation is not at_five)
        await until(pilot, lambda: screen.allocation is not None and screen.allocation.target_bpw < 4.91)
        out = folder / "tiny-optiq-4.9bpw"
        await pilot.press("w")
        await until(pilot, lambda: bool(app.jobs.running))
        await pilot.press("s")  # One job at a time.
        assert len(app.jobs.all) == 3
        await until(pilot, lambda: not app.jobs.running)
        assert app.jobs.all[-1].error == ""
        assert (out / "config.json").is_file()
        assert "held-out tokens" in text_of(app, "#result")
        await pilot.press("o")
        await until(pilot, lambda: bool(opened))
        assert opened == [out.with_name(out.name + ".html").as_uri()]
        assert Path(opened[0].removeprefix("file://")).is_file()
        await choose_cache(pilot, app, out)

    piloted(app, script)


async def measure_stop_and_go_on(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    screen.query_one("#source", Input).value = "./tiny"
    await pilot.press("enter")
    await until(pilot, lambda: screen.facts is not None)
    assert "llama, 2 blocks" in text_of(app, "#facts")
    form = screen.query_one("#measure-options", OptionForm)
    form.fill("num_tokens", 3)
    await until(pilot, lambda: "at least 64" in text_of(app, "#measure-options #about"))
    screen.query_one("#measure", Button).press()
    await pilot.pause()
    assert app.jobs.all == []  # A value out of bounds starts nothing.
    form.fill("num_tokens", 64)
    form.fill("window", 16)
    await pilot.press("escape", "e")
    await until(pilot, lambda: bool(app.jobs.all) and app.jobs.all[0].progress is not None)
    await pilot.press("x")
    await until(pilot, lambda: app.jobs.all[0].state == "stopped")
    assert "goes on" in text_of(app, "JobPanel")
    await pilot.press("e", "1")  # Long work goes on when the screen is left.
    await until(pilot, lambda: screen.table is not None)
    assert app.jobs.all[1].state == "finished"
    await pilot.press("4")
    await until(pilot, lambda: screen.allocation is not None)


async def choose_cache(pilot: Pilot[Any], app: LabApp, out: Path) -> None:
    screen = screen_of(app)
    await pilot.press("k")
    await until(pilot, lambda: screen.query_one("#kv-model", Input).value == str(out))
    form = screen.query_one("#kv-options", OptionForm)
    for name, value in {"target_bits": 6, "context": 64, "num_tokens": 64, "rotate": False}.items():
        form.fill(name, value)
    screen.query_one("#kv-start", Button).press()
    await until(pilot, lambda: "bits per cached number" in text_of(app, "#kv-result"))
    assert app.jobs.all[-1].command.words[-1] == "--no-rotate"
    config = read_kv_config(out)
    assert [layer.k.label in text_of(app, "#kv-result") for layer in config.layers] == [True, True]
    assert screen.query_one(ModelPane).cache_bits == pytest.approx(config.bits_per_number, abs=0.05)
    bits = screen.query_one(ModelPane).cache_bits
    await until(pilot, lambda: screen.facts is not None and screen.facts.cache_bits == bits)


def test_the_budget_answers_keys_and_mouse() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: screen_of(app).allocation is not None)
        await a_recording_starts_nothing(pilot, app)
        await the_slider_moves_by_keys_and_mouse(pilot, app)
        await a_size_moves_the_budget_and_one_too_small_is_refused(pilot, app)
        await modules_are_pinned_in_the_map_and_the_command_says_so(pilot, app)

    piloted(demo_lab("quantize", until=1), script, WIDE)


async def the_slider_moves_by_keys_and_mouse(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    await until(pilot, lambda: screen.allocation is not None)
    slider = screen.query_one(BudgetSlider)
    await pilot.press("b")
    await until(pilot, lambda: slider.has_focus)
    assert slider.value == 5.0
    await pilot.press("right", "pageup")
    assert slider.value == pytest.approx(5.55)
    await pilot.press("home")
    assert slider.value == slider.ends.low
    await pilot.click(BudgetSlider, offset=(slider.size.width - 3, 0))
    assert slider.value == slider.ends.high
    await until(pilot, lambda: "8.5" in text_of(app, "#choice"))
    await pilot.press("v", "v")
    assert screen.query_one(BitsPane).has_class("-curve")


async def modules_are_pinned_in_the_map_and_the_command_says_so(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    await pilot.press("b")
    screen.query_one(BudgetSlider).move_to(5.0)
    await until(pilot, lambda: screen.allocation is not None and screen.allocation.target_bpw < 5.01)
    assert screen.allocation is not None
    before = screen.allocation.bit_map.choices["model.layers.1.self_attn.k_proj"]
    await pilot.press("p", "down", "right")
    await until(pilot, lambda: "model.layers.1.self_attn.k_proj" in text_of(app, "#wishes"))
    assert f"[{before.bits}]" in text_of(app, "#map")
    await pilot.press("plus")
    await until(pilot, lambda: "1 pinned" in text_of(app, "#wishes"))
    await pilot.press("space", "plus")
    await until(pilot, lambda: "8 pinned" in text_of(app, "#wishes"))
    pinned = screen.allocation.bit_map.choices["model.layers.1.self_attn.k_proj"]
    assert pinned.bits > before.bits + 1
    await pilot.press("d", "b")
    await until(pilot, lambda: "edges" in text_of(app, "#wishes"))
    await until(pilot, lambda: screen.query_one(BudgetSlider).has_focus)
    await pilot.press("right")
    await until(pilot, lambda: "--target-bpw 5.05" in text_of(app, "#command"))
    line = text_of(app, "#command")
    assert line.startswith("optiq convert dense-16m ")
    assert f"model.layers.1.self_attn.k_proj={pinned.label}" in line
    assert line.endswith("--protect edges")
    await pilot.press("y")
    assert app.clipboard == line
    await pilot.press("p", "delete", "d")
    await until(pilot, lambda: "pinned" not in text_of(app, "#wishes").splitlines()[0])


async def a_size_moves_the_budget_and_one_too_small_is_refused(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    await until(pilot, lambda: screen.allocation is not None)
    await pilot.press("f", *"2MB", "enter")
    await until(pilot, lambda: "the least is" in text_of(app, "#wrong"))
    app.screen.query_one("#size", Input).value = "10MB"
    await pilot.press("enter")
    await until(pilot, lambda: app.screen is screen)
    await until(pilot, lambda: screen.allocation is not None and screen.allocation.nbytes > 9_900_000)
    assert screen.allocation is not None
    assert screen.allocation.nbytes <= 10_000_000
    await pilot.press("f", "enter", *"8GB", "enter")
    await until(pilot, lambda: "config.json" in text_of(app, "#wrong"))
    await pilot.press("escape")
    assert app.screen is screen


async def a_recording_starts_nothing(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    await until(pilot, lambda: screen.allocation is not None)
    await pilot.press("w", "e", "s")
    await pilot.pause()
    assert app.jobs.all == []


def test_what_is_picked_or_cannot_be_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sensitivity(folder / "s.json", recorded_table())

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await offline_the_cache_is_offered(pilot, app, monkeypatch)
        await a_folder_that_is_none_is_refused(pilot, app, folder / "nothing")
        await a_sensitivity_file_is_opened_without_its_model(pilot, app, folder / "s.json")
        await another_model_does_not_take_its_bits(pilot, app)

    piloted(lab_at(NOBODY, "quantize"), script)


async def look_for(pilot: Pilot[Any], app: LabApp, words: str) -> None:
    await pilot.press("m")
    app.screen.query_one("#source", Input).value = words
    await until(pilot, lambda: app.screen.query_one("#source").has_focus)
    await pilot.press("enter")


async def offline_the_cache_is_offered(
    pilot: Pilot[Any], app: LabApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(words: str) -> tuple[FoundModel, ...]:
        raise ModelNotFound("the Hub does not answer")

    monkeypatch.setattr(model_pane, "search_models", nobody)
    cached = (
        FoundModel(repo_id="acme/tiny", is_cached=True),
        FoundModel(repo_id="acme/other", is_cached=True),
    )
    monkeypatch.setattr(model_pane, "cached_models", lambda: cached)
    await look_for(pilot, app, "tin")
    await until(pilot, lambda: "does not answer" in text_of(app, "#said"))
    found = app.screen.query_one("#found", DataTable)
    assert found.row_count == 1
    assert found.get_row_at(0)[0] == "acme/tiny"


async def a_folder_that_is_none_is_refused(pilot: Pilot[Any], app: LabApp, path: Path) -> None:
    await look_for(pilot, app, str(path))
    await until(pilot, lambda: "there is no folder" in text_of(app, "#said"))
    await pilot.press("escape", "e")
    assert app.jobs.all == []
    assert not app.screen.query_one(JobPanel).display


async def a_sensitivity_file_is_opened_without_its_model(pilot: Pilot[Any], app: LabApp, path: Path) -> None:
    screen = screen_of(app)
    await look_for(pilot, app, str(path))
    await until(pilot, lambda: screen.allocation is not None)
    assert screen.query_one(TabbedContent).active == "bits"
    assert screen.model == "dense-16m"


async def another_model_does_not_take_its_bits(pilot: Pilot[Any], app: LabApp) -> None:
    screen = screen_of(app)
    await look_for(pilot, app, "./tiny")
    await until(pilot, lambda: screen.facts is not None)
    await pilot.press("escape", "b", "right", "w")
    assert screen.query_one(BitsPane).has_class("-unmeasured")
    assert screen.allocation is None
    assert app.jobs.all == []


def test_leaving_while_a_budget_is_allocated_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, left = threading.Event(), threading.Event()

    def slow(table: SensitivityTable, options: AllocateOptions) -> Allocation:
        begun.set()
        left.wait(10)
        return allocate(table, options)

    monkeypatch.setattr(bits_pane, "allocate", slow)

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, begun.is_set)
        await pilot.press("w", "y")  # Of a budget that is not allocated yet nothing is written.
        assert app.clipboard == ""
        threading.Timer(0.2, left.set).start()
        app.exit()

    piloted(demo_lab("quantize", until=1), script)


@pytest.mark.skipif(version("textual") != "8.2.8", reason="the pictures were made with Textual 8.2.8")
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_recording_looks_as_before(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    async def drawn(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, LabApp)
        await until(pilot, lambda: app.status is not None and "⠒" in text_of(app, "#curve"))
        await until(pilot, lambda: "block" in text_of(app, "#map"))
        app.screen.query_one(TopBar).display = False  # Its tabs are those of all screens.
        await pilot.pause(0.3)

    assert snap_compare(demo_lab("quantize", until=1), terminal_size=size, run_before=drawn)
