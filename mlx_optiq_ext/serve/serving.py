"""What every route reaches: the engine, and how this server reads pictures.

Put into the application's state by ``create_app``; routes ask :func:`serving_of`.
"""

from concurrent.futures import Future
from typing import Any

import msgspec
from litestar import Request
from litestar.datastructures import State

from mlx_optiq_ext.serve.clients import Clients
from mlx_optiq_ext.serve.images import ImageReader
from mlx_optiq_ext.serve.names import name_adapter
from mlx_optiq_ext.serve.run import Run
from mlx_optiq_ext.types.chat import Generation
from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.status import EngineStatus

__all__ = ["Serving", "serving_of"]

_KEY = "serving"


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The engine with what HTTP adds to it."""

    engine: Engine
    images: ImageReader = ImageReader()
    clients: Clients = msgspec.field(default_factory=Clients)
    adapter_folders: tuple[str, ...] = ()
    """Of ``--adapters-dir``; listed here, mounted from by the engine."""

    def status(self) -> EngineStatus:
        """The engine's latest snapshot with the clients seen last."""
        return msgspec.structs.replace(self.engine.status(), clients=self.clients.status())

    def run(self, *requests: Generation) -> Run:
        """Make the run of a request, or of several that one answer consists of; nothing is submitted yet."""
        return Run(self.engine, *(self._named(request) for request in requests))

    def count_tokens(self, request: Generation) -> "Future[int]":
        """Prompt tokens that :meth:`run` of the same request would use."""
        return self.engine.count_tokens(self._named(request))

    def state(self) -> State:
        """The application state in which :func:`serving_of` finds this."""
        return State({_KEY: self})

    def _named(self, request: Generation) -> Generation:
        return name_adapter(request, self.engine.status().models)


def serving_of(request: Request[Any, Any, Any]) -> Serving:
    """What this request's application serves."""
    serving = request.app.state[_KEY]
    assert isinstance(serving, Serving)
    return serving
