"""The screen of clients: their settings for the server that is shown, copied, written and taken back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support_engine import FakeEngine, ready_status
from support_http import live
from support_tui import WIDE, demo_lab, lab_at, piloted, screen_text, until
from textual.pilot import Pilot
from textual.widgets import OptionList

from mlx_optiq_integrations.client import all_clients
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.client import ServerClient
from mlx_optiq_tui.integrations.screen import IntegrationsScreen
from mlx_optiq_tui.question import Question


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for variable in ("CLAUDE_CONFIG_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(FakeEngine(status=ready_status())) as url:
        yield url


async def _choose(pilot: Pilot[Any], name: str) -> None:
    clients = pilot.app.screen.query_one("#clients", OptionList)
    clients.highlighted = list(all_clients()).index(name)
    await pilot.pause()


def test_every_client_has_something_to_copy(url: str) -> None:
    copied: dict[str, str] = {}

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "org/tiny" in screen_text(app))
        for name in all_clients():
            await _choose(pilot, name)
            await pilot.press("c")
            copied[name] = app.clipboard

    piloted(lab_at(url, "integrations"), script)
    for name, text in copied.items():
        assert "org/tiny" in text, name
        assert url in text, name


def test_a_file_is_written_after_a_look_at_the_difference_and_brought_back(home: Path, url: str) -> None:
    settings = home / ".claude" / "settings.json"
    settings.parent.mkdir()
    settings.write_text('{"model": "mine"}\n')

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "org/tiny" in screen_text(app))
        await _choose(pilot, "claude-code")
        for answer, changed in (("n", False), ("y", True)):
            await pilot.press("w")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await until(pilot, lambda: '+  "env": {' in screen_text(app))
            await pilot.press(answer)
            await until(pilot, lambda: isinstance(app.screen, IntegrationsScreen))
            assert ("ANTHROPIC_BASE_URL" in settings.read_text()) is changed
        written = json.loads(settings.read_text())
        assert written["model"] == "mine"
        assert written["env"]["ANTHROPIC_BASE_URL"] == url
        await pilot.press("z")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await until(pilot, lambda: settings.read_text() == '{"model": "mine"}\n')

    piloted(lab_at(url, "integrations"), script, WIDE)


def test_a_key_is_copied_but_not_shown(url: str) -> None:
    app = LabApp(ServerClient(url, key="very-secret"), first="integrations")

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "org/tiny" in screen_text(app))
        for name in all_clients():
            await _choose(pilot, name)
            assert "very-secret" not in screen_text(app)
        await _choose(pilot, "claude-code")
        await pilot.press("c")
        assert "very-secret" in app.clipboard

    piloted(app, script, WIDE)


def test_parts_take_turns_and_what_has_no_file_is_said(url: str) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "org/tiny" in screen_text(app))
        await _choose(pilot, "aider")
        assert "(1 of 2)" in screen_text(app)
        await pilot.press("n")
        await until(pilot, lambda: "(2 of 2)" in screen_text(app))
        await pilot.press("w")
        await until(pilot, lambda: "has no file of its own" in screen_text(app))

    piloted(lab_at(url, "integrations"), script, WIDE, toasts=True)


def test_who_asked_lately_is_shown(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    httpx.post(f"{url}/v1/chat/completions", json=body, headers={"user-agent": "codex/1.0"})

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await until(pilot, lambda: "codex" in screen_text(app) and "1 request, " in screen_text(app))

    piloted(lab_at(url, "integrations"), script)


def test_nothing_is_written_for_the_recording(home: Path) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await _choose(pilot, "claude-code")
        await until(pilot, lambda: "ANTHROPIC_BASE_URL" in screen_text(app))
        await pilot.press("w")
        await until(pilot, lambda: "the recording is no server" in screen_text(app))

    piloted(demo_lab("integrations"), script, WIDE, toasts=True)
    assert list(home.iterdir()) == []
