"""HTTP/1.1 with a limit on what a request's head may take, in bytes and in time.

The parser itself keeps a head of any length. Used by :mod:`mlx_optiq_ext.serve.run_server`; a body is limited
by the application.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["limited_protocol"]

MAX_HEAD_NBYTES = 64 << 10
_ANSWER = b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def limited_protocol(timeout_s: float, max_nbytes: int = MAX_HEAD_NBYTES) -> type[asyncio.Protocol]:
    """Make the protocol class: a head that is longer is answered with 431, one that is slower with 408.

    Args:
        timeout_s: From the connection, or the first byte of a later request, to the end of the head.
        max_nbytes: Of the request line and all headers; a piece that completes a head is not counted.
    """

    class LimitedProtocol(HttpToolsProtocol):
        _nbytes = 0
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._begin_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._timer is not None:
                self._nbytes += len(data)
                if self._nbytes > max_nbytes:
                    self._refuse(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._begin_head()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _begin_head(self) -> None:
            self._end_head()
            self._nbytes = 0
            self._timer = self.loop.call_later(timeout_s, self._refuse, b"408 Request Timeout")

        def _end_head(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: bytes) -> None:
            self._end_head()
            if not self.transport.is_closing():
                self.transport.write(_ANSWER % status)
                self.transport.close()

    return LimitedProtocol
