"""Listening: uvicorn around the application, from the socket to the last running answer.

A first SIGTERM or SIGINT drains: new requests get 503 and running ones end. After ``drain_s``, or on a second
signal, what still runs is cut: streams end with the error event of their dialect. A third one leaves at once.
Called by ``optiq serve``.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from litestar.types import ASGIApp

from mlx_optiq_ext.errors import EngineError, UsageError
from mlx_optiq_ext.serve.protocol import limited_protocol
from mlx_optiq_ext.types.port import Engine
from mlx_optiq_ext.types.serve import ServeOptions

__all__ = ["Server", "require_free_address", "run_server"]

_log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
_LOOK_S = 0.1
"""How soon a second signal shows while requests run."""
_LAST_WORDS_S = 5
"""What answers get to be sent once the engine has ended them all."""


class Server(uvicorn.Server):
    """One listening socket, an application and the engine behind it.

    Args:
        app: What :func:`.create_app` made.
        engine: Drained and closed when the server ends.
        options: Address, port and time limits.
        on_listening: Told the URLs once requests are taken, first the one that this machine reaches.
    Raises:
        UsageError: The address cannot be listened on.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        options: ServeOptions,
        on_listening: Callable[[tuple[str, ...]], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=limited_protocol(options.timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )
        self._engine = engine
        self._drain_s = options.drain_s
        self._on_listening = on_listening
        self._socket = _listen(options.host, options.port)
        self._draining: threading.Thread | None = None
        self._cut = threading.Event()
        self.engine_failed = False

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = self._socket.getsockname()[1]
        return port

    def serve_until_stopped(self) -> None:
        """Take requests until a signal, :meth:`stop`, or the engine's failure. Blocks."""
        try:
            self.run(sockets=[self._socket])
        finally:
            self._socket.close()
            if self._draining is None:
                self._engine.close()
            else:
                self._draining.join(_LAST_WORDS_S if self.force_exit else None)

    def stop(self) -> None:
        """Drain, then end; from any thread. The second call cuts what runs, the third ends at once."""
        if self._cut.is_set():
            self.force_exit = True
            self.should_exit = True
        elif self._draining is not None:
            self._cut.set()
        else:
            _log.info("stopping: running requests get %g s; stop again to cut them", self._drain_s)
            self._draining = threading.Thread(target=self._drain, name="optiq-drain", daemon=True)
            self._draining.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's names
        """Stop on a signal; the process ends with our exit code, not by the signal."""
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell where."""
        await super().startup(sockets)
        if self.started:
            self._on_listening(_urls(*self._socket.getsockname()[:2]))

    async def on_tick(self, counter: int) -> bool:
        """End when the engine has failed for good."""
        if self._draining is None and self._engine.status().state == "failed":
            self.engine_failed = True
            return True
        return await super().on_tick(counter)

    def _drain(self) -> None:
        began = time.monotonic()
        while not self._engine.drain(_LOOK_S):
            if self._cut.is_set() or time.monotonic() - began >= self._drain_s:
                running = len(self._engine.status().rows)
                _log.warning("%d running requests are cut after %.1f s", running, time.monotonic() - began)
                self._cut.set()
                break
        self._engine.close()
        self.should_exit = True


def run_server(
    app: ASGIApp, engine: Engine, options: ServeOptions, *, on_listening: Callable[[tuple[str, ...]], None]
) -> int:
    """Serve until stopped; the exit code of the command line.

    Args:
        app: What :func:`.create_app` made.
        engine: Started; closed here.
        options: Address, port and time limits.
        on_listening: Told the URLs once requests are taken, first the one that this machine reaches.
    Raises:
        UsageError: The address cannot be listened on.
    """
    try:
        server = Server(app, engine, options, on_listening)
    except UsageError:
        engine.close()
        raise
    server.serve_until_stopped()
    return EngineError.exit_code if server.engine_failed else 0


def require_free_address(host: str, port: int) -> None:
    """Make sure that an address can be listened on, before the long work of loading a model.

    Raises:
        UsageError: It cannot.
    """
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; give another --host or --port "
            "(0 takes a free one)"
        ) from error


def _urls(host: str, port: int) -> tuple[str, ...]:
    """Where an address that is listened on can be asked; one that stands for all is none itself."""
    hosts = {"0.0.0.0": ("127.0.0.1", socket.gethostname()), "::": ("::1", socket.gethostname())}
    return tuple(
        f"http://[{each}]:{port}" if ":" in each else f"http://{each}:{port}"
        for each in hosts.get(host, (host,))
    )
