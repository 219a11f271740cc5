"""Turn a termination signal into the same clean stop as Ctrl-C.

A process that ends by the signal's default action runs no ``finally``: partial outputs would stay behind.
Knows nothing of what is being stopped. Used by the command line and by the stock commands' "optiq" recipe.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Stopped", "clean_stop", "exit_code"]

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def clean_stop() -> Iterator[None]:
    """Raise :class:`Stopped` in the main thread when SIGTERM or SIGHUP arrives; undone at the end.

    Signals that somebody else handles or ignores (``nohup``) are left alone, and so is everything where the
    caller is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [signum for signum in _SIGNALS if signal.getsignal(signum) is signal.SIG_DFL]
    try:
        for signum in taken:
            signal.signal(signum, _stop)
        yield
    finally:
        for signum in taken:
            signal.signal(signum, signal.SIG_DFL)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell would see after the signal: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    return 128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)


def _stop(signum: int, _frame: FrameType | None) -> None:
    raise Stopped(signum)
