"""Make the pictures of the dashboard in README.md and docs/lab.md, from recorded data.

python docs/pictures/screenshots.py            # all
python docs/pictures/screenshots.py monitor    # one
"""

import argparse
import asyncio
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from mlx_optiq_tui.app import LabApp
from mlx_optiq_tui.demo.server import demo_client

FOLDER = Path(__file__).parent
SIZE = (120, 36)
PATIENCE_S = 30.0
MOMENTS = 40


class Shot:
    """One picture: which screen, what is pressed, and what must show before it is taken.

    Args:
        screen: To open.
        keys: To press.
        shows: Text that is waited for,
        times: so many of it.
        speed: Of the recording; answers that say how fast they came need the real one, 1.
    """

    def __init__(self, screen: str, *keys: str, shows: str, times: int = 1, speed: float = 0.0) -> None:
        self.screen, self.keys, self.shows, self.times, self.speed = screen, keys, shows, times, speed


PROMPT = "In two sentences: why is the sky blue?"
CODE = "Write a Python function that says whether a number is prime."

SHOTS = {
    "monitor": Shot("monitor", shows="out="),
    "adapters": Shot("adapters", shows="rank"),
    "chat": Shot("chat", *CODE, "enter", shows="tok/s", speed=1.0),
    "quantize": Shot("quantize", "right", "right", shows="⠒"),
    "finetune": Shot("finetune", "r", shows="validation"),
    "integrations": Shot("integrations", "down", "down", shows="ANTHROPIC_BASE_URL"),
    "compare": Shot("adapters", "c", *PROMPT, "enter", "escape", shows="a second", times=2, speed=1.0),
}


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(SHOTS))
    os.environ["TZ"] = "UTC"
    time.tzset()
    for name in parser.parse_args().names or SHOTS:
        (FOLDER / f"{name}.svg").write_text(asyncio.run(take(SHOTS[name])), "utf-8")


async def take(shot: Shot) -> str:
    """The SVG of one picture."""
    app = LabApp(demo_client(speed=shot.speed, until=MOMENTS), is_demo=True, first=shot.screen)
    num_moments = 0 if shot.speed else MOMENTS - 10
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: app.status is not None and len(app.history.decode) > num_moments)
        await pilot.press(*shot.keys)
        await until(pilot, lambda: text_of(app).count(shot.shows) >= shot.times)
        await pilot.pause(0.5)
        # A picture in a page may load nothing; the browser's own monospace font does.
        return re.sub(r"@font-face\s*{[^}]*}", "", app.export_screenshot(title="optiq lab"))


async def until(pilot: Pilot[Any], condition: Callable[[], bool]) -> None:
    """Let the app work until something holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"this never showed:\n{text_of(pilot.app)}")
        await pilot.pause(0.05)


def text_of(app: Any) -> str:
    """The characters on the screen."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


if __name__ == "__main__":
    main()
