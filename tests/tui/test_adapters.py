"""The adapters' screen: over a real engine that mounts real adapters, and over the recording."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from support_http import live
from support_serving import engine_on, spec_of, tiny_folder
from support_tui import WIDE, demo_lab, lab_at, piloted, screen_text, until
from textual.pilot import Pilot
from textual.widgets import DataTable, Select

from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.files import write_adapter
from mlx_optiq_ext.types.adapter import AdapterConfig
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.widgets.rank_map import rank_by_bits_map, rank_difference_map, rank_map

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    shelf = tmp_path_factory.mktemp("adapters")
    for k, name in enumerate(("one", "two")):
        factors = {path: Factors(mx.ones((128, 2 + k)), mx.ones((2 + k, 128))) for path in PATHS}
        write_adapter(
            shelf / name, Adapter(AdapterConfig(ranks=dict.fromkeys(PATHS, 2 + k), scale=1.0), factors)
        )
    engine = engine_on(
        spec_of(tiny_folder(tmp_path_factory.mktemp("models") / "tiny")), adapters_dir=(str(shelf),)
    )
    with live(engine, ServeOptions(adapters_dir=(str(shelf),))) as url:
        yield url
    engine.close()


def test_adapters_are_mounted_chosen_compared_and_unmounted(url: str) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        table = app.screen.query_one("#table", DataTable)
        await until(pilot, lambda: table.row_count == 2)
        assert "one can be mounted: m" in screen_text(app)
        await pilot.press("m", "enter", "enter")
        await until(pilot, lambda: "○  one" in screen_text(app))
        assert "self_attn.q_proj" in screen_text(app)
        await pilot.press("v")
        await until(pilot, lambda: "16  bits: 2 modules, rank 2 to 2, mean 2.0" in screen_text(app))
        await pilot.press("v")
        await until(pilot, lambda: "no other adapter" in screen_text(app))
        await pilot.press("v", "d")
        await until(pilot, lambda: "●  one" in screen_text(app))
        await pilot.press("c", *"Hi", "enter")
        await until(pilot, lambda: screen_text(app).count("tokens, first after") == 2)
        assert [str(each.value) for each in app.screen.query(Select)] == ["base", "one"]
        await pilot.press("escape", "t", "b")
        await until(pilot, lambda: "○  one" in screen_text(app))
        await until(pilot, lambda: app.status is not None and app.status.adapters[0].requests == 1)
        await pilot.press("u", "y")
        await until(pilot, lambda: app.status is not None and not app.status.adapters)

    piloted(lab_at(url, "adapters"), script)


def test_what_cannot_be_mounted_is_said_in_the_servers_words(url: str) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: app.screen.query_one("#table", DataTable).row_count == 2)
        await pilot.press("m", "ctrl+u", *"nowhere", "enter", "enter")
        await until(pilot, lambda: "is no adapter folder" in screen_text(app))

    piloted(lab_at(url, "adapters"), script, WIDE, toasts=True)


def test_the_recorded_server_mounts_and_answers_with_each_adapter() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        table = app.screen.query_one("#table", DataTable)
        await until(pilot, lambda: table.row_count == 2)
        await pilot.press("down", "m", "enter", "enter")
        await until(pilot, lambda: table.row_count == 2 and "○  terse" in screen_text(app))
        await pilot.press("c", *"In two sentences: why is the sky blue?", "enter")
        await until(pilot, lambda: "matey" in screen_text(app) and "Rayleigh" in screen_text(app))

    piloted(demo_lab("adapters"), script)


def test_ranks_are_drawn_by_module_and_block_in_bands() -> None:
    ranks = {f"model.layers.{k}.self_attn.q_proj": 2 + k for k in range(30)} | {"lm_head": 8}
    lines = rank_map(ranks, 40).plain.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert sum(line.startswith("f_attn.q_proj") for line in lines) == 2
    narrow = rank_map({PATHS[0]: 4, PATHS[1]: 16}, 60).plain.splitlines()
    assert narrow[1].split() == ["self_attn.q_proj", "4", "16"]
    assert narrow[-1].split() == ["rank", "4", "16"]


def test_ranks_are_drawn_on_the_bits_under_them_and_against_other_ranks() -> None:
    ranks, bits = {PATHS[0]: 4, PATHS[1]: 16}, {PATHS[0]: 3, PATHS[1]: 8}
    lines = rank_by_bits_map(ranks, bits, 60).plain.splitlines()
    assert lines[1].split() == ["self_attn.q_proj", "4", "16"]
    assert lines[2:] == [
        " 3  bits: 1 module, rank 4 to 4, mean 4.0",
        " 8  bits: 1 module, rank 16 to 16, mean 16.0",
    ]
    other = {PATHS[0]: 8, "model.layers.1.self_attn.k_proj": 2}
    lines = rank_difference_map(ranks, other, 60).plain.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["self_attn.q_proj", "-4", "+16"],
        ["self_attn.k_proj", "-2"],
    ]
    assert lines[-1] == "more rank in 1, less in 2, the same in 0"
