"""The dashboard in a real browser: it draws, takes keys, and asks nobody but its own server."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from PIL import Image
from support_browser import browsing, find_chromium

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed"),
]


@pytest.fixture
def address() -> Iterator[str]:
    """Of ``optiq tui --web --demo``, with its token."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "mlx_optiq_ext", "tui", "--web", "--demo", "--port", str(port), "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    document = ""
    while not document.rstrip().endswith("}"):
        document += process.stdout.readline()
    try:
        yield json.loads(document)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_the_dashboard_works_in_a_browser_and_loads_nothing_from_elsewhere(address: str) -> None:
    async def run() -> None:
        program = find_chromium()
        assert program is not None
        async with browsing(program) as browser:
            await browser.send("Page.navigate", url=address)
            await browser.until(lambda: "SmolLM2-135M-Instruct" in browser.received)
            await browser.press("2")
            await browser.until(lambda: "Unmount" in browser.received and "pirate" in browser.received)
            await browser.press("m")
            await browser.until(lambda: "Name in requests" in browser.received)
            await asyncio.sleep(1.0)
            picture = Image.open(io.BytesIO(await browser.picture())).convert("RGB")
            colors = picture.getcolors(maxcolors=2**24)
            assert colors is not None
            assert len(colors) > 50, "the page is blank"
            own = address.partition("/?")[0].removeprefix("http://")
            asked = [each for each in browser.addresses if not each.startswith(("data:", "about:", "blob:"))]
            assert any(each.startswith(f"ws://{own}") for each in asked)
            assert {each.partition("://")[2].partition("/")[0] for each in asked} == {own}

    asyncio.run(run())
