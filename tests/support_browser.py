"""A headless Chromium, driven over its own protocol: open a page, press keys, see what it asked and got.

Source: Chrome DevTools Protocol (domains Page, Network, Input).
"""

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

__all__ = ["Browser", "browsing", "find_chromium"]

_PATIENCE_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    """The program; None where it is not installed."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page; notes every address that it asked for, and all that came over its sockets."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.addresses: list[str] = []
        self.received = ""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    async def send(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self._answers[number], _PATIENCE_S)

    async def press(self, key: str) -> None:
        """Press a key that writes a character."""
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def picture(self) -> bytes:
        """What the page looks like, as PNG."""
        return base64.b64decode((await self.send("Page.captureScreenshot"))["data"])

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, self.received[-2000:]
            await asyncio.sleep(0.05)

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            params = said.get("params", {})
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said.get("result"))
            elif said["method"] == "Network.requestWillBeSent":
                self.addresses.append(params["request"]["url"])
            elif said["method"] == "Network.webSocketCreated":
                self.addresses.append(params["url"])
            elif said["method"] == "Network.webSocketFrameReceived":
                self.received += _payload(params["response"])


def _payload(frame: dict[str, Any]) -> str:
    data = str(frame["payloadData"])
    return base64.b64decode(data).decode("utf-8", "replace") if frame["opcode"] == 2 else data


@asynccontextmanager
async def browsing(program: str) -> AsyncIterator[Browser]:
    """Start a browser with a profile of its own; it is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program,
            "--headless=new",
            # In containers there is no room for its sandbox; it opens our own page only.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--window-size=1200,800",
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            "about:blank",
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                pages = await (await session.get(f"http://127.0.0.1:{port}/json/list")).json()
                address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    browser = Browser(socket)
                    await browser.send("Page.enable")
                    await browser.send("Network.enable")
                    yield browser
        finally:
            process.terminate()
            await process.wait()


async def _port(file: Path) -> int:
    for _ in range(round(_PATIENCE_S / 0.1)):
        if file.exists() and file.read_text().strip():
            return int(file.read_text().split()[0])
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start")
