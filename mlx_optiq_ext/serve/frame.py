"""What surrounds every request before and after it is routed: doors, time limits, the access log.

An ASGI layer between Litestar and its router, so that unknown paths pass through it as well.
"""

from typing import Any

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.serve.access_log import log_end
from mlx_optiq_ext.serve.account import Account
from mlx_optiq_ext.serve.auth import Doors
from mlx_optiq_ext.serve.clients import Clients
from mlx_optiq_ext.serve.dialect import answer_problem
from mlx_optiq_ext.serve.limits import arrive_within

__all__ = ["Frame"]

_ID_HEADERS = {"anthropic": b"request-id", "openai": b"x-request-id", "responses": b"x-request-id"}
"""In which each dialect tells a request's id, that of the log."""


class Frame:
    """Lets requests in, bounds their arrival and logs each in one line, without bodies or keys.

    Args:
        inner: The router.
        doors: Who may ask.
        clients: Notes who did.
        timeout_s: Seconds until a whole request must have arrived.
    """

    def __init__(self, inner: ASGIApp, doors: Doors, clients: Clients, timeout_s: float) -> None:
        self._inner = inner
        self._doors = doors
        self._clients = clients
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != ScopeType.HTTP:
            await self._inner(scope, receive, send)
            return
        account = Account.of(scope)
        cors = self._doors.cors(scope["headers"])
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = (_ID_HEADERS[account.dialect], account.id.encode())
                message["headers"] = [*message["headers"], name, *cors]
            await send(message)

        try:
            await self._serve(scope, receive, noted)
        finally:
            log_end(account, status, scope["path"])

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        server = (scope.get("server") or (None,))[0]
        try:
            preflight = self._doors.preflight(scope["method"], scope["headers"], server)
            if preflight is not None:
                await send({"type": "http.response.start", "status": 204, "headers": preflight})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            self._doors.check(scope["path"], scope["headers"], server)
        except OptiqError as error:
            request: Request[Any, Any, Any] = Request(scope, receive, send)
            response = answer_problem(request, error)
            await response.to_asgi_response(app=None, request=request)(scope, receive, send)
            return
        self._clients.note(scope)
        await self._inner(scope, arrive_within(receive, self._timeout_s, Account.of(scope).leave), send)
