"""The server's routes over an engine of a test: in process, or on a loopback port for real clients."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from litestar import Litestar
from litestar.testing import TestClient

from mlx_optiq_ext.serve.app import create_app
from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["app_of", "client_of", "events_of", "live", "shown"]

_PATIENCE_S = 20.0


def app_of(engine: Engine, options: ServeOptions | None = None) -> Litestar:
    """The application as ``optiq serve`` makes it, without a key."""
    return create_app(engine, options or ServeOptions(), None)


def client_of(engine: Engine) -> TestClient[Litestar]:
    """A client in this process; to be entered."""
    return TestClient(app_of(engine), base_url="http://127.0.0.1:8080")


@contextmanager
def live(engine: Engine, options: ServeOptions | None = None) -> Iterator[str]:
    """Serve on a free loopback port; the base URL without a path."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app_of(engine, options), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + _PATIENCE_S
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_PATIENCE_S)
        listener.close()


def events_of(text: str) -> list[tuple[str | None, str]]:
    """The server-sent events of a whole stream: name and data; comments are left out."""
    events: list[tuple[str | None, str]] = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
        values = {name: value for name, _, value in lines}
        if "data" in values:
            events.append((values.get("event"), values["data"]))
    return events


def shown(value: Any, *volatile: str) -> Any:
    """A document with the values of the named keys as ``*``, wherever they are, for comparing."""
    if isinstance(value, dict):
        return {k: "*" if k in volatile and v is not None else shown(v, *volatile) for k, v in value.items()}
    return [shown(each, *volatile) for each in value] if isinstance(value, list) else value
