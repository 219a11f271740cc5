"""Which clients asked lately, for operators: product, dialect, requests.

Knows the names that clients give themselves in ``User-Agent``, and nothing of who they are. Noted by
``frame`` when a request is let in, read by the control paths.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable

from litestar.types import Scope

from mlx_optiq_ext.serve.auth import header_values
from mlx_optiq_ext.serve.paths import dialect_of, is_control
from mlx_optiq_ext.types.status import ClientStatus, Dialect

__all__ = ["Clients"]

MAX_CLIENTS = 16
_PRODUCT = re.compile(r"[\w.@~+-]{1,40}", re.ASCII)


class Clients:
    """The clients that were seen last, on the thread of the server's loop.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[tuple[str, Dialect], tuple[int, float]] = OrderedDict()

    def note(self, scope: Scope) -> None:
        """Count a request; those of operators are left out."""
        if is_control(scope):
            return
        key = (_product(scope), dialect_of(scope))
        requests, _ = self._seen.pop(key, (0, 0.0))
        self._seen[key] = (requests + 1, self._clock())
        if len(self._seen) > MAX_CLIENTS:
            self._seen.popitem(last=False)

    def status(self) -> tuple[ClientStatus, ...]:
        """All of them, the one seen last first."""
        now = self._clock()
        return tuple(
            ClientStatus(name=name, dialect=dialect, requests=requests, last_seen_s=now - seen)
            for (name, dialect), (requests, seen) in reversed(self._seen.items())
        )


def _product(scope: Scope) -> str:
    """The first word of ``User-Agent`` without its version; comments may tell of the user's machine."""
    agent = b"".join(header_values(scope["headers"], b"user-agent")[:1])
    named = _PRODUCT.match(agent.decode("latin-1"))
    return named.group() if named else "unknown"
