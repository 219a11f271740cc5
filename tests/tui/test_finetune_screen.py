"""The fine-tune screen by keys, on a tiny model with real commands, and on recorded data."""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support_http import live
from support_models import save_model_folder, tiny_model
from support_serving import engine_on, spec_of, tiny_folder
from support_training import CHAT_TEMPLATE
from support_tui import NARROW, WIDE, demo_lab, lab_at, piloted, screen_text, until
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Select, Static, TextArea

from mlx_optiq_ext.lora.factors import Adapter, Factors
from mlx_optiq_ext.lora.files import write_adapter
from mlx_optiq_ext.types.adapter import AdapterConfig
from mlx_optiq_ext.types.serve import ServeOptions
from mlx_optiq_ext.types.status import AdapterStatus
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.finetune.data_pane import DataPane
from mlx_optiq_tui.finetune.draft import draft_file
from mlx_optiq_tui.finetune.problem_list import ProblemList
from mlx_optiq_tui.finetune.row_editor import RowEditor
from mlx_optiq_tui.finetune.screen import FinetuneScreen
from mlx_optiq_tui.finetune.train_pane import TrainPane
from mlx_optiq_tui.widgets.option_form import OptionForm
from mlx_optiq_tui.widgets.text_page import TextPage
from mlx_optiq_tui.widgets.top_bar import TopBar

NOBODY = "http://127.0.0.1:9"
ROWS = [{"prompt": f"What is {index} + 1?", "completion": f"It is {index + 1}."} for index in range(12)]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the draft of a data set is kept."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the dashboard and of what it starts, with a model and rows in it."""
    model = save_model_folder(tmp_path / "tiny", tiny_model())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.path.abspath(path) for path in sys.path if path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def screen_of(app: LabApp) -> FinetuneScreen:
    assert isinstance(app.screen, FinetuneScreen)
    return app.screen


def text_of(screen: FinetuneScreen, selector: str) -> str:
    return str(screen.query_one(selector, Static).render())


async def plan(pilot: Pilot[Any], screen: FinetuneScreen, steps: int) -> None:
    """Name the base, and keep the training short."""
    screen.query_one(TrainPane).fill("base", "tiny")
    form = screen.query_one(OptionForm)
    for name, value in {"steps": steps, "batch_size": 2, "report_every": 1, "rank": 2}.items():
        form.fill(name, value)
    await pilot.press("escape")


def test_rows_become_data_a_plan_and_an_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = lab_at(NOBODY, "finetune")
    opened: list[str] = []
    mounted: list[tuple[str, str]] = []
    monkeypatch.setattr(app, "open_url", lambda url, **_: opened.append(url))

    async def mount(name: str, source: str) -> AdapterStatus:
        mounted.append((name, source))
        return AdapterStatus(name=name, model="tiny", source=source, rank=2)

    monkeypatch.setattr(app.client, "mount", mount)

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        data = screen.query_one(DataPane)
        await pilot.press("i")
        await until(pilot, lambda: screen.focused is screen.query_one("#path"))
        screen.query_one("#path", Input).value = "rows.jsonl"
        await pilot.press("enter")
        await until(pilot, lambda: len(data.rows) == 12)
        await pilot.press("g")
        await until(pilot, lambda: (folder / "data" / "test.jsonl").is_file())
        await until(pilot, lambda: screen.query_one(TrainPane).field("data") == "data")
        await plan(pilot, screen, steps=3)
        await pilot.press("k")
        await until(pilot, lambda: bool(app.jobs.all) and not app.jobs.running)
        assert "updates 3" in text_of(screen, "#plan")
        assert "<assistant>" in text_of(screen, "#samples")
        assert not (folder / "adapter").exists()
        await pilot.press("escape", "s", "1")  # Long work goes on when the screen is left.
        await until(pilot, lambda: len(app.jobs.all) == 2 and not app.jobs.running)
        assert [job.error for job in app.jobs.all] == ["", ""]
        assert (folder / "adapter" / "adapters.safetensors").is_file()
        await pilot.press("5")
        await until(pilot, lambda: "update 3 of 3" in text_of(screen, "#figures"))
        assert 3 in screen.course.train
        assert 3 in screen.course.valid
        await pilot.press("u")
        await until(pilot, lambda: bool(mounted))
        assert mounted == [("adapter", str(folder / "adapter"))]
        await pilot.press("f")
        assert opened == [(folder / "adapter").as_uri()]

    piloted(app, script)


def test_an_adapter_is_mounted_into_a_real_server_whose_model_is_offered_as_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    shelf, model = tmp_path / "shelf", tiny_folder(tmp_path / "tiny")
    config = AdapterConfig(ranks={path: 2}, scale=1.0)
    write_adapter(shelf / "mine", Adapter(config, {path: Factors(mx.ones((128, 2)), mx.ones((2, 128)))}))
    engine = engine_on(spec_of(model), adapters_dir=(str(shelf),))

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        pane = screen_of(app).query_one(TrainPane)
        await until(pilot, lambda: pane.field("base") == model.name)
        pane.fill("adapter", str(shelf / "mine"))
        await pilot.press("u")
        await until(pilot, lambda: app.status is not None and bool(app.status.adapters))
        assert app.status is not None
        assert (app.status.adapters[0].name, app.status.adapters[0].rank) == ("mine", 2)

    try:
        with live(engine, ServeOptions(adapters_dir=(str(shelf),))) as url:
            piloted(lab_at(url, "finetune"), script)
    finally:
        engine.close()


def test_a_training_that_is_stopped_goes_on(folder: Path) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        screen.query_one(TrainPane).fill("data", "rows.jsonl")
        await plan(pilot, screen, steps=400)
        await pilot.press("s")
        await until(pilot, lambda: max(screen.course.train, default=0) >= 1)
        await pilot.press("x")
        await until(pilot, lambda: not app.jobs.running)
        assert app.jobs.all[0].state == "stopped"
        done = max(screen.course.train)
        await pilot.press("s")
        await until(pilot, lambda: bool(screen.course.train))
        assert min(screen.course.train) >= done
        await pilot.press("x")
        await until(pilot, lambda: not app.jobs.running)

    piloted(lab_at(NOBODY, "finetune"), script)


def test_rows_are_added_edited_checked_and_deleted() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        data = screen.query_one(DataPane)
        assert "no rows yet" in text_of(screen, "#problems")
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, RowEditor))
        area = app.screen.query_one(TextArea)
        area.text = "## user\nHi"
        await until(pilot, lambda: "nothing to learn" in str(app.screen.query_one("#wrong", Static).render()))
        area.text = "## user\nHi\n## assistant\nHello"
        await until(pilot, lambda: "usable" in str(app.screen.query_one("#wrong", Static).render()))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.screen is screen)
        assert data.rows[0]["messages"][1] == {"role": "assistant", "content": "Hello"}
        assert screen.query_one(DataTable).get_row_at(0)[:3] == ["1", "chat", "✓"]
        data.rows.append({})
        data.draw(1)
        await until(pilot, lambda: "row 2: none of the known forms" in text_of(screen, "#problems"))
        await pilot.press("w")
        await until(pilot, lambda: isinstance(app.screen, ProblemList))
        await pilot.press("enter")
        await until(pilot, lambda: app.screen is screen)
        assert data.here == 1
        await pilot.press("g")  # Refused: a row is unusable.
        await pilot.press("delete")
        assert len(data.rows) == 1
        screen.query_one("#method").focus()
        await pilot.press("enter", "down", "enter")
        await until(pilot, lambda: data.method == "dpo")
        assert "no chosen" in text_of(screen, "#problems")
        await pilot.press("escape", "n")
        await until(pilot, lambda: isinstance(app.screen, RowEditor))
        await pilot.press("escape")  # The template goes with the editor.
        await until(pilot, lambda: app.screen is screen)
        assert len(data.rows) == 1

    piloted(lab_at(NOBODY, "finetune"), script)


def test_a_long_list_is_shown_in_pages_and_each_of_its_rows_can_be_reached(folder: Path) -> None:
    many = [{"text": f"number {index}"} for index in range(4500)] + [{"text": "[/] [/b] number 1"}, {}]
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many) + "no row\n")

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        data, table = screen.query_one(DataPane), screen.query_one(DataTable)
        await pilot.press("i")
        await until(pilot, lambda: screen.focused is screen.query_one("#path"))
        screen.query_one("#path", Input).value = "many.jsonl"
        await pilot.press("enter")
        await until(pilot, lambda: len(data.rows) == 4502)
        assert "4,502 rows, 1 to mend, 1 line not taken; w lists them; 1 to 2,000" in text_of(
            screen, "#problems"
        )
        assert table.row_count == 2000
        await pilot.press("]", "]", "]", "ctrl+end")
        assert data.here == 4501
        assert table.row_count == 502
        await until(pilot, lambda: "row 4,502: " in text_of(screen, "#problems"))
        await pilot.press("delete", "[")
        assert data.here == 2000
        assert len(data.rows) == 4501

    piloted(lab_at(NOBODY, "finetune"), script)


def test_the_first_file_says_by_which_method_its_rows_are_read(folder: Path) -> None:
    pairs = [{"prompt": f"{index}?", "chosen": "yes", "rejected": "no"} for index in range(3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        data = screen.query_one(DataPane)
        await pilot.press("i")
        await until(pilot, lambda: screen.focused is screen.query_one("#path"))
        screen.query_one("#path", Input).value = "pairs.jsonl"
        await pilot.press("enter")
        await until(pilot, lambda: len(data.rows) == 3)
        await until(pilot, lambda: "3 rows, nothing wrong" in text_of(screen, "#problems"))
        assert data.method == screen.query_one("#method", Select).value == "dpo"

    piloted(lab_at(NOBODY, "finetune"), script)


def test_what_was_not_saved_is_there_again(folder: Path) -> None:
    async def write(pilot: Pilot[Any], app: LabApp) -> None:
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, RowEditor))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: isinstance(app.screen, FinetuneScreen))

    async def save(pilot: Pilot[Any], app: LabApp) -> None:
        data = screen_of(app).query_one(DataPane)
        assert [row["messages"][1]["content"] for row in data.rows] == ["Where is the Eiffel Tower?"]
        await pilot.press("g")
        await until(pilot, lambda: not draft_file().exists())

    async def look(pilot: Pilot[Any], app: LabApp) -> None:
        assert screen_of(app).query_one(DataPane).rows == []

    for script in (write, save, look):
        piloted(lab_at(NOBODY, "finetune"), script)
    assert (folder / "data" / "train.jsonl").is_file()


def test_a_row_is_shown_as_the_model_reads_it_and_the_plan_stays(folder: Path) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        screen.query_one(TrainPane).fill("base", "tiny")
        await pilot.press("n")
        await until(pilot, lambda: isinstance(app.screen, RowEditor))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.screen is screen)
        await pilot.press("y")
        await until(pilot, lambda: isinstance(app.screen, TextPage))
        await until(pilot, lambda: "<assistant>" in screen_text(app))
        assert screen.query_one(TrainPane).planned is None
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen)

    piloted(lab_at(NOBODY, "finetune"), script)


def test_an_import_that_fails_is_said(folder: Path) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        await pilot.press("i")
        await until(pilot, lambda: screen.focused is screen.query_one("#path"))
        screen.query_one("#path", Input).value = "nothing.jsonl"
        await pilot.press("enter")
        await until(pilot, lambda: any("no such file" in note.message for note in app._notifications))

    piloted(lab_at(NOBODY, "finetune"), script)


def test_nothing_starts_before_it_is_said_what() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await pilot.press("s", "k", "y", "u", "f")
        await pilot.pause()
        assert app.jobs.all == []
        said = " ".join(note.message for note in app._notifications)
        assert "say base and data first" in said
        assert "holds no adapter yet" in said

    piloted(lab_at(NOBODY, "finetune"), script)


def test_the_form_gives_flags_of_what_was_changed_alone() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        screen = screen_of(app)
        form = screen.query_one(OptionForm)
        assert form.flags() == ()
        form.fill("rank", 4)
        form.fill("learning_rate", "1e-3")
        form.fill("dpo_loss", "ipo")
        form.fill("grad_checkpoint", True)
        assert form.flags() == (
            *("--rank", "4", "--learning-rate", "0.001", "--grad-checkpoint", "--dpo-loss", "ipo"),
        )

    piloted(lab_at(NOBODY, "finetune"), script)


@pytest.mark.skipif(version("textual") != "8.2.8", reason="the pictures were made with Textual 8.2.8")
@pytest.mark.parametrize(("key", "size"), [("d", NARROW), ("t", WIDE), ("r", NARROW)])
def test_the_recording_looks_as_before(
    snap_compare: Callable[..., bool], key: str, size: tuple[int, int]
) -> None:
    async def drawn(pilot: Pilot[Any]) -> None:
        app = pilot.app
        assert isinstance(app, LabApp)
        await until(pilot, lambda: app.status is not None)
        await pilot.press(key)
        await pilot.pause(0.3)
        app.set_focus(None)
        app.screen.query_one(TopBar).display = False  # Its tabs are those of all screens.
        await pilot.pause(0.3)

    assert snap_compare(demo_lab("finetune", until=1), terminal_size=size, run_before=drawn)
