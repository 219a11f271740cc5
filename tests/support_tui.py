"""The dashboard without a terminal: run it against a server or the recording, press keys, read the screen."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from textual.pilot import Pilot

from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.client import ServerClient
from mlx_optiq_tui.demo.server import demo_client

__all__ = ["demo_lab", "lab_at", "piloted", "screen_text", "until"]

_PATIENCE_S = 20.0
NARROW, WIDE = (80, 24), (120, 40)

Script = Callable[[Pilot[Any], LabApp], Awaitable[None]]


def demo_lab(first: str = "", *, until: int = 30) -> LabApp:
    """The dashboard of the recording, which stands still after so many moments."""
    return LabApp(demo_client(speed=0, until=until), is_demo=True, first=first)


def lab_at(url: str, first: str = "") -> LabApp:
    """The dashboard of a server of a test."""
    return LabApp(ServerClient(url, first_wait_s=0.05), first=first)


def piloted(app: LabApp, script: Script, size: tuple[int, int] = NARROW, *, toasts: bool = False) -> None:
    """Run the app while ``script`` presses its keys; ``toasts`` shows notifications over the screen."""

    async def run() -> None:
        async with app.run_test(size=size, notifications=toasts) as pilot:
            await until(pilot, lambda: app.connection.state != "connecting")
            await script(pilot, app)

    asyncio.run(run())


async def until(pilot: Pilot[Any], condition: Callable[[], bool]) -> None:
    """Let the app work until something holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"this never held; shown:\n{screen_text(pilot.app)}"
        await pilot.pause(0.02)


def screen_text(app: Any) -> str:
    """The characters on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)
