"""The access log: a line when a request starts, some while a long prompt is computed, one at the end.

Without bodies or keys: a line says who asked for what in the names of the protocol, tokens, times, and the
error that the client was told. Called by ``frame`` for every request and by ``sse`` for those that generate.
"""

import logging
import time

from mlx_optiq_ext.serve.account import Account
from mlx_optiq_ext.types.events import Prefilled

__all__ = ["CLIENT_LEFT", "PrefillLog", "log_end", "log_start"]

_log = logging.getLogger("mlx_optiq_ext.access")
_OFTEN_ASKED = ("/health", "/metrics", "/optiq/status", "/optiq/clients", "/optiq/log")
"""Asked again and again by machines: logged below INFO."""
_PREFILL_EVERY_S = 10.0
_MAX_LINE = 1000
_MAX_MESSAGE = 300
CLIENT_LEFT = 499


def log_start(account: Account) -> None:
    """Tell that the engine has accepted a request."""
    jobs = ",".join(account.jobs)
    _write(
        logging.INFO,
        account,
        f"started dialect={account.dialect} model={account.model} prompt={account.prompt_tokens} job={jobs}",
    )


class PrefillLog:
    """Tells every ten seconds how far the prompt of a request is.

    Args:
        account: Of the request.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._told = time.monotonic()

    def see(self, event: object) -> None:
        """Note an event."""
        if isinstance(event, Prefilled) and time.monotonic() - self._told >= _PREFILL_EVERY_S:
            self._told = time.monotonic()
            _write(
                logging.INFO,
                self._account,
                f"prefill {event.done}/{event.total} after {self._account.elapsed_s:.1f}s",
            )


def log_end(account: Account, status: int, path: str) -> None:
    """Tell how a request ended.

    Args:
        account: What it took.
        status: That was sent; 0 for none.
        path: Of the request.
    """
    if account.client_left:
        status = CLIENT_LEFT
    elif account.problem is not None and status == 200:
        status = account.problem.status  # an answer that was cut after its headers
    words = [str(status)]
    if account.model:
        words.append(
            f"model={account.model} prompt={account.prompt_tokens} cached={account.cached_tokens} "
            f"out={account.completion_tokens}"
        )
    if account.first_token_s is not None:
        words.append(f"first={account.first_token_s:.3f}s")
    words.append(f"total={account.elapsed_s:.3f}s")
    if account.problem is not None and not account.client_left:
        words.append(f"{account.problem.kind}: {account.problem.text[:_MAX_MESSAGE]}")
    _write(_level(status, path), account, " ".join(words))


def _level(status: int, path: str) -> int:
    if status >= 400 and status != CLIENT_LEFT:
        return logging.WARNING
    return logging.DEBUG if path in _OFTEN_ASKED else logging.INFO


def _write(level: int, account: Account, words: str) -> None:
    # A path may hold line ends after decoding; one request stays one line.
    line = f"{account.id} {account.what[:200]} {words}".encode("unicode_escape").decode("ascii")
    _log.log(level, "%s", line[:_MAX_LINE])
