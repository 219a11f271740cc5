"""How the screens look on recorded data, in a small and in a large terminal.

Made with one version of Textual; others may draw a little differently and are left out.
``pytest tests/tui/test_pictures.py --snapshot-update`` accepts what a change made of them.
"""

import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
from support_tui import NARROW, WIDE, demo_lab, until
from textual.pilot import Pilot

from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.demo.recording import read_recording
from mlx_optiq_tui.screens import SCREENS

pytestmark = pytest.mark.skipif(
    version("textual") != "8.2.8", reason="the pictures were made with Textual 8.2.8"
)

Compare = Callable[..., bool]
MOMENTS = 30


@pytest.fixture(autouse=True)
def every_screen_has_its_tab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_optiq_tui.app.installed_screens", lambda: SCREENS)


@pytest.fixture(autouse=True)
def fixed_time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


async def _played(pilot: Pilot[Any]) -> None:
    """Until the recording stands still, and all that came is drawn."""
    app = pilot.app
    assert isinstance(app, LabApp)
    last = read_recording().moments[MOMENTS - 1].status.uptime_s
    await until(pilot, lambda: app.status is not None and app.status.uptime_s == last)
    await pilot.pause(0.3)


@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("screen", ["monitor", "adapters"])
def test_a_screen_looks_as_before(snap_compare: Compare, screen: str, size: tuple[int, int]) -> None:
    assert snap_compare(demo_lab(screen, until=MOMENTS), terminal_size=size, run_before=_played)
