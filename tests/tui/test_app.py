"""The frame: screens by key and by palette, help, themes, jobs, a server that goes away and comes back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support_engine import ready_status
from support_tui import NARROW, WIDE, demo_lab, piloted, screen_text, until
from textual.pilot import Pilot

from mlx_optiq_ext.types.palette import parse_hex
from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.client import ServerClient
from mlx_optiq_tui.help_screen import HelpScreen, shown_bindings
from mlx_optiq_tui.jobs import Job
from mlx_optiq_tui.question import Question
from mlx_optiq_tui.screens import SCREENS, installed_screens
from mlx_optiq_tui.themes import THEMES


@pytest.mark.parametrize(("prefix", "size"), [("", NARROW), ("f", WIDE)])
def test_every_screen_opens_by_digit_and_by_function_key(prefix: str, size: tuple[int, int]) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        for entry in installed_screens():
            await pilot.press("f1", f"{prefix}{entry.key}")
            assert app.current_mode == entry.name
            assert app.screen.query(".tab.-here").first().region.height == 1

    piloted(demo_lab(), script, size)


def test_keys_and_names_of_screens_are_distinct() -> None:
    assert len({entry.key for entry in SCREENS}) == len({entry.name for entry in SCREENS}) == 6


def test_every_key_of_every_screen_is_in_the_palette_and_in_the_help() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        for entry in installed_screens():
            await pilot.press(f"f{entry.key}")
            await pilot.pause()
            titles = {command.title for command in app.get_system_commands(app.screen)}
            described = {active.binding.description for active in shown_bindings(app.screen)}
            assert described <= titles
            assert {each.title for each in installed_screens()} <= titles
            app.action_help()
            await pilot.pause()
            assert isinstance(app.screen, HelpScreen)
            assert all(words in app.screen._text for words in described - {e.title for e in SCREENS})
            await pilot.press("escape")

    piloted(demo_lab(), script)


def test_the_palette_opens_a_screen_by_name() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await pilot.press("ctrl+p", *"adapters")
        await until(pilot, lambda: "Mount, unmount" in screen_text(app))
        await pilot.press("enter", "enter")
        await until(pilot, lambda: app.current_mode == "adapters")

    piloted(demo_lab(), script)


@pytest.mark.parametrize("theme", [theme.name for theme in THEMES])
def test_text_is_readable_in_every_theme(theme: str) -> None:
    """WCAG 2.2: a contrast of 4.5 for text, on the background and on panels."""
    colors = next(each for each in THEMES if each.name == theme)
    for ink in (colors.foreground, colors.error, colors.warning, colors.primary):
        for ground in (colors.background, colors.panel):
            assert ink is not None
            assert ground is not None
            dark, light = sorted((_luminance(ink), _luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def _luminance(color: str) -> float:
    shares = [channel / 255 for channel in parse_hex(color)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class Switched(httpx.AsyncBaseTransport):
    """A server that can be pulled off and put back."""

    def __init__(self) -> None:
        self.is_on = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self.is_on:
            raise httpx.ConnectError("connection refused", request=request)
        if request.url.path == "/optiq/events":
            return httpx.Response(200, stream=_Snapshots(self))
        return httpx.Response(200, json={"data": []})


class _Snapshots(httpx.AsyncByteStream):
    def __init__(self, server: Switched) -> None:
        self._server = server

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._server.is_on:
            yield b"event: status\ndata: " + msgspec.json.encode(ready_status()) + b"\n\n"
        while self._server.is_on:
            # Said often, so that the stream ends as soon as the server does.
            await asyncio.sleep(0.01)
            yield b": keepalive\n\n"
        raise httpx.ReadError("connection lost")


def test_a_server_that_comes_late_goes_away_and_comes_back_is_shown() -> None:
    server = Switched()
    app = LabApp(ServerClient("http://test", transport=server, first_wait_s=0.02))

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        assert "optiq serve" in screen_text(app)
        assert "connection refused" in screen_text(app)
        server.is_on = True
        await until(pilot, lambda: "ready" in screen_text(app) and "org/tiny" in screen_text(app))
        server.is_on = False
        await until(pilot, lambda: "✕" in screen_text(app))
        assert "asking again" in screen_text(app)
        assert app.screen.has_class("-lost")
        await pilot.press("f2")
        assert app.current_mode == "adapters"
        server.is_on = True
        await until(pilot, lambda: "● ready" in screen_text(app))
        assert not app.screen.has_class("-lost")

    piloted(app, script)


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands take one step and wait until this file is there; SIGTERM ends them as ours."""
    go, program = tmp_path / "go", tmp_path / "program"
    program.write_text(
        f"""#!/bin/sh
echo '{{"stage": "wait", "done": 1, "total": 2, "seconds": 0.1}}' >&2
trap 'echo "{{\\"note\\": \\"stopped\\"}}" >&2; exit 143' TERM
while [ ! -e '{go}' ]; do sleep 0.05; done
echo '{{"said": "done"}}'
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr("mlx_optiq_integrations.command.sys.executable", str(program))
    return go


def test_a_job_goes_on_while_screens_change_and_tells_its_result(waiting: Path) -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        told: list[Job] = []
        app.job_signal.subscribe(app.screen, told.append)
        job = await app.jobs.start("Wait long", ["wait"])
        await until(pilot, lambda: job.progress is not None and job.progress.done == 1)
        await pilot.press("f2")
        await until(pilot, lambda: "⚙ Wait long" in screen_text(app))
        waiting.touch()
        await until(pilot, lambda: job.state == "finished")
        assert job.result == {"said": "done"}
        assert told[-1] is job
        await until(pilot, lambda: "⚙" not in screen_text(app))

    piloted(demo_lab(), script)


def test_a_job_that_fails_says_why_in_its_own_words() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        job = await app.jobs.start("Report", ["report", "/nowhere"])
        await until(pilot, lambda: job.state == "failed")
        assert "/nowhere" in job.error

    piloted(demo_lab(), script)


@pytest.mark.usefixtures("waiting")
def test_a_job_is_stopped_from_the_palette() -> None:
    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        job = await app.jobs.start("Wait long", ["wait"])
        await until(pilot, lambda: job.progress is not None)
        [stop] = [each for each in app.get_system_commands(app.screen) if each.title == "Stop Wait long"]
        stop.callback()
        await until(pilot, lambda: job.state == "stopped")
        assert not app.jobs.running

    piloted(demo_lab(), script)


@pytest.mark.usefixtures("waiting")
def test_leaving_asks_while_a_job_runs_and_stops_it() -> None:
    app = demo_lab()

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        await app.jobs.start("Wait long", ["wait"])
        for key in ("n", "y"):
            await pilot.press("ctrl+q")
            await until(pilot, lambda: isinstance(app.screen, Question))
            assert "Wait long" in screen_text(app)
            assert app.jobs.running
            await pilot.press(key)

    piloted(app, script)
    assert [(job.state, job.command.exit_code) for job in app.jobs.all] == [("stopped", 143)]


def test_text_from_elsewhere_steers_no_terminal() -> None:
    hostile = "a\x1b]52;c;SEVJTA==\x07b\x1b[2Jc\x9b31md\u202ee\tf"

    async def script(pilot: Pilot[Any], app: LabApp) -> None:
        app.notify(hostile, markup=False, timeout=60)
        await until(pilot, lambda: "a]52;c;SEVJTA==b[2Jc31mde" in screen_text(app))
        written = "".join(
            segment.text
            for strip in app.screen._compositor.render_strips()
            for segment in strip
            if not segment.control
        )
        assert not set(written) & {"\x1b", "\x07", "\x9b", "\u202e"}

    piloted(demo_lab(), script, WIDE, toasts=True)
