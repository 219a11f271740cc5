"""What one request took, gathered while its answer passes, for the access log.

Knows events and times; the lines are written by :mod:`mlx_optiq_ext.serve.access_log`.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from litestar.types import Scope

from mlx_optiq_ext.serve.paths import dialect_of
from mlx_optiq_ext.types.events import Accepted, Event, Failed, Finished, Prefilled, Started

__all__ = ["Account"]

_KEY = "optiq_account"


class Account:
    """Who asked for what, tokens and times of one request, several answers added up.

    Args:
        scope: Of the request.
    """

    def __init__(self, scope: Any) -> None:
        self._begin = time.monotonic()
        self.id = f"req_{secrets.token_hex(6)}"
        self.what = f"{scope['method']} {scope['path']}"
        self.dialect = dialect_of(scope)
        self.jobs: Sequence[str] = ()
        """The engine's names of its answers."""
        self.model = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.first_token_s: float | None = None
        """Seconds since the request arrived."""
        self.problem: Failed | None = None
        self.client_left = False

    @classmethod
    def of(cls, scope: Scope) -> "Account":
        """The account of a request, opened by the first who asks."""
        state = scope.setdefault("state", {})
        if _KEY not in state:
            state[_KEY] = cls(scope)
        account = state[_KEY]
        assert isinstance(account, Account)
        return account

    @property
    def elapsed_s(self) -> float:
        """Since the request arrived."""
        return time.monotonic() - self._begin

    def leave(self) -> None:
        """Note that the client has closed the connection."""
        self.client_left = True

    def see(self, event: Event) -> None:
        """Note what an event tells."""
        if isinstance(event, Accepted):
            self.model = event.model
            self.prompt_tokens += event.prompt_tokens
        elif isinstance(event, Started):
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, Failed):
            self.problem = event
            self.completion_tokens += event.completion_tokens
        elif isinstance(event, Finished):
            self.completion_tokens += event.usage.completion_tokens
        elif self.first_token_s is None and not isinstance(event, Prefilled):
            self.first_token_s = self.elapsed_s
