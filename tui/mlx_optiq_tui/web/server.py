"""Serve the dashboard to a browser of this machine, and to nobody else.

What a terminal can do, a page could do too: so the server listens on the loopback address, takes only
requests that are addressed to it (a name that resolves here is another site), only from its own page, and
only with the token of the address that the command shows, for other users of the machine reach the port as
well. Nothing is loaded from elsewhere. Called by ``optiq tui --web``.
"""

import hmac
import secrets
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler
from textual_serve.server import Server

from mlx_optiq_ext.errors import UsageError

__all__ = ["LabServer"]

_HOST = "127.0.0.1"


class LabServer(Server):
    """Starts the dashboard anew for each page that is opened.

    Args:
        command: Words of the command that runs in each session.
        port: Where to listen.
        on_listening: Told the address to open.
    Raises:
        UsageError: The port is taken.
    """

    def __init__(self, command: Sequence[str], port: int, on_listening: Callable[[str], None]) -> None:
        _require_free(port)
        super().__init__(
            shlex.join(command),
            host=_HOST,
            port=port,
            title="optiq lab",
            templates_path=Path(__file__).parent,
        )
        self.token = secrets.token_urlsafe(24)
        self._on_listening = on_listening
        self._cookie = f"optiq-lab-{port}"
        self._address = f"{_HOST}:{port}"

    def initialize_logging(self) -> None:
        """Leave the process's logging as it is."""

    async def on_startup(self, app: web.Application) -> None:  # noqa: ARG002 - called by its base
        """Say where the page is."""
        self._on_listening(f"{self.public_url}/?token={self.token}")

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._guard)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("host", "")
        if host != self._address:
            raise web.HTTPForbidden(text=f"this server answers at {self._address} only")
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            raise web.HTTPForbidden(text=f"origin {origin[:100]!r} may not use this server")
        if "token" in request.query:
            if not self._knows(request.query["token"]):
                raise web.HTTPForbidden(text="the token is not the one of this server")
            # The page's own requests carry the cookie, and the address bar keeps no secret.
            answer = web.HTTPFound(f"http://{host}/")
            answer.set_cookie(self._cookie, self.token, httponly=True, samesite="Strict")
            raise answer
        if not self._knows(request.cookies.get(self._cookie, "")):
            raise web.HTTPForbidden(text="open the address that `optiq tui --web` shows, with its token")
        return await handler(request)

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


def _require_free(port: int) -> None:
    try:
        socket.create_server((_HOST, port)).close()
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; name another port") from error
