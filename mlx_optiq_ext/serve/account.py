"""What one request took, gathered while its answer passes, for the access log.

Knows events and times; the log line is written by :mod:`mlx_optiq_ext.serve.access`.
"""

import time

from litestar.types import Scope

from mlx_optiq_ext.types.events import Accepted, Event, Finished, Prefilled, Started

__all__ = ["Account"]

_KEY = "optiq_account"


class Account:
    """Tokens and times of one request, several answers added up. Seconds since the request arrived."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.model = ""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.first_token_s: float | None = None
        self.client_left = False

    @classmethod
    def of(cls, scope: Scope) -> "Account":
        """The account of a request, opened by the first who asks."""
        state = scope.setdefault("state", {})
        account = state.setdefault(_KEY, cls())
        assert isinstance(account, Account)
        return account

    @property
    def elapsed_s(self) -> float:
        """Since the request arrived."""
        return time.monotonic() - self._begin

    def see(self, event: Event) -> None:
        """Note what an event tells."""
        if isinstance(event, Accepted):
            self.model = event.model
        elif isinstance(event, Finished):
            self.prompt_tokens += event.usage.prompt_tokens
            self.cached_tokens += event.usage.cached_tokens
            self.completion_tokens += event.usage.completion_tokens
        elif self.first_token_s is None and not isinstance(event, Started | Prefilled):
            self.first_token_s = self.elapsed_s
