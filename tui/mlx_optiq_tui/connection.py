"""Whether the server is reached, in words."""

from typing import Literal

import msgspec

__all__ = ["Connection"]


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """State of the connection to the server."""

    state: Literal["connecting", "connected", "lost"] = "connecting"
    reason: str = ""
    """Why it is lost."""

    def words(self, url: str) -> str:
        """For people."""
        if self.state == "connected":
            return f"connected to {url}"
        if self.state == "connecting":
            return f"connecting to {url}"
        return f"{self.reason}; asking again"
