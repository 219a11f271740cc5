"""Keep the beginning of what a program writes, count the rest, and say when it is too much."""

import asyncio
from collections.abc import Callable

from mlx_optiq_tui.chat.sandbox.result import SandboxLimits

__all__ = ["KeptOutput"]

_CHUNK = 2**16


class KeptOutput:
    """One stream of a program.

    Args:
        limits: How much is kept, and how much more may be written.
        overflow: Called once when it was more.
    """

    def __init__(self, limits: SandboxLimits, overflow: Callable[[], None]) -> None:
        self._kept = bytearray()
        self._limits = limits
        self._overflow = overflow
        self.dropped_nbytes = 0

    @property
    def text(self) -> str:
        """What was kept; bytes that are no UTF-8 are shown as such."""
        return self._kept.decode("utf-8", "backslashreplace")

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read to the end."""
        while chunk := await stream.read(_CHUNK):
            room = self._limits.output_nbytes - len(self._kept)
            self._kept += chunk[:room]
            before = self.dropped_nbytes
            self.dropped_nbytes += len(chunk[room:])
            if before <= self._limits.dropped_nbytes < self.dropped_nbytes:
                self._overflow()
