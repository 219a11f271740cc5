"""Carry what happens on one thread to whoever waits on another."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["attempt", "refuse", "settle"]

T = TypeVar("T")
_log = logging.getLogger(__name__)


def settle(future: "Future[T]", action: Callable[[], T]) -> None:
    """Give a future what the action answers or raises; nothing runs for one that was cancelled."""
    if future.set_running_or_notify_cancel():
        attempt(lambda: future.set_result(action()), future.set_exception)


def refuse(future: "Future[T]", error: Exception) -> None:
    """Give a future an error, unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def attempt(action: Callable[[], None], otherwise: Callable[[Exception], None]) -> None:
    """Run an action; what it raises goes to ``otherwise``, which tells the one who asked."""
    try:
        action()
    except Exception as error:  # noqa: BLE001  told to the one who asked
        _log.debug("a request was refused", exc_info=True)
        otherwise(error)
