"""The dashboard as a page: who is let in, what the page loads, and that it is the dashboard."""

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from mlx_optiq_ext.cli.main import main
from mlx_optiq_ext.errors import UsageError
from mlx_optiq_tui.web.server import LabServer

COMMAND = (sys.executable, "-m", "mlx_optiq_ext", "tui", "--demo")
_PATIENCE_S = 30.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def _page() -> AsyncIterator[tuple[str, str]]:
    """The address without and with its token."""
    told: list[str] = []
    server = LabServer(COMMAND, _free_port(), told.append)
    runner = web.AppRunner(await server._make_app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", server.port).start()
    try:
        yield server.public_url, told[0]
    finally:
        await runner.cleanup()


def _with_page(script: Callable[[aiohttp.ClientSession, str, str], Awaitable[None]]) -> None:
    async def run() -> None:
        # Cookies of an address without a name are kept by the "unsafe" jar only.
        jar = aiohttp.CookieJar(unsafe=True)
        async with _page() as (url, told), aiohttp.ClientSession(cookie_jar=jar) as session:
            await script(session, url, told)

    asyncio.run(run())


def test_nobody_is_let_in_without_the_token_or_from_another_page() -> None:
    async def script(session: aiohttp.ClientSession, url: str, told: str) -> None:
        for path in ("/", "/ws", "/static/js/textual.js", "/?token=guess"):
            assert (await session.get(url + path)).status == 403
        assert (await session.get(told, headers={"host": "evil.example"})).status == 403
        assert (await session.get(told, headers={"origin": "http://evil.example"})).status == 403
        answer = await session.get(told)
        assert answer.status == 200
        assert "token" not in str(answer.url)
        for headers in ({"origin": "http://evil.example"}, {"host": "localhost:1"}):
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await session.ws_connect(f"{url}/ws", headers=headers)
        cookie = answer.history[0].headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie

    _with_page(script)


def test_the_page_loads_nothing_from_elsewhere() -> None:
    async def script(session: aiohttp.ClientSession, url: str, told: str) -> None:
        page = await (await session.get(told)).text()
        addresses = re.findall(r"(?:https?|wss?)://[^\"')\s]+", page)
        assert addresses
        for address in addresses:
            assert address.startswith((url, url.replace("http", "ws"))), address
            if "/static/" in address:
                assert (await session.get(address)).status == 200, address

    _with_page(script)


# textual-serve leaves it to the garbage collector to close the pipes of a session that ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_of_the_page_is_the_dashboard() -> None:
    async def script(session: aiohttp.ClientSession, url: str, told: str) -> None:
        await session.get(told)
        shown = b""
        address = f"{url}/ws?width=100&height=30"
        async with session.ws_connect(address, headers={"origin": url}) as page:
            while b"SmolLM2-135M-Instruct" not in shown or b"Adapters" not in shown:
                message = await asyncio.wait_for(page.receive(), _PATIENCE_S)
                assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), shown[-500:]
                shown += message.data if isinstance(message.data, bytes) else message.data.encode()

    _with_page(script)


def test_a_port_that_is_taken_is_said() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match="name another port"),
    ):
        LabServer(COMMAND, taken.getsockname()[1], lambda url: None)


@pytest.mark.parametrize("command", ["tui", "lab"])
def test_the_command_needs_a_terminal_or_a_browser(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    assert "--web shows it in a browser" in capsys.readouterr().err
    assert main([command, "--screen", "nowhere"]) == 2
    assert "screens are monitor, adapters" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'textual'", name="textual")

    monkeypatch.setattr("mlx_optiq_ext.cli.commands.tui._show", gone)
    assert main(["tui"]) == 2
    assert "pip install 'mlx-optiq-ext[tui]'" in capsys.readouterr().err
