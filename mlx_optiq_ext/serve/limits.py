"""Limits on what a client may send: how long a request may take to arrive.

The size of a body is Litestar's to check, that of the headers the protocol's (``serve.run_server``).
"""

import asyncio
import time
from collections.abc import Callable

from litestar.exceptions import HTTPException
from litestar.types import HTTPReceiveMessage, Receive, WebSocketReceiveMessage

__all__ = ["arrive_within"]


def arrive_within(receive: Receive, timeout_s: float, on_left: Callable[[], None]) -> Receive:
    """Wrap ``receive`` so that the body must be complete in time; what comes later is not limited.

    Args:
        receive: The server's.
        timeout_s: Seconds from now.
        on_left: Called where the client leaves before its request is complete.

    The wrapped function raises an ``HTTPException`` 408 when it is not.
    """
    deadline = time.monotonic() + timeout_s
    complete = False

    async def received() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise HTTPException(
                f"the request did not arrive within {timeout_s:g} s", status_code=408
            ) from None
        if message["type"] == "http.disconnect":
            on_left()
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return received
