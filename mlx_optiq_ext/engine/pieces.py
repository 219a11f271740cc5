"""Long work on the owner thread that lets rows go on: one piece of it between any two steps.

Knows neither the work nor rows. Called by ``engine``.
"""

from collections.abc import Generator
from concurrent.futures import Future
from typing import TypeVar

from mlx_optiq_ext.engine.owner import Owner
from mlx_optiq_ext.engine.served import ModelSpec
from mlx_optiq_ext.engine.settle import attempt, refuse, settle

__all__ = ["run_in_pieces"]

T = TypeVar("T")


def run_in_pieces(owner: Owner, spec: ModelSpec, work: Generator[None, None, T], future: "Future[T]") -> None:
    """Give a future what the work returns or raises; it ends early when the future is cancelled.

    Args:
        owner: On whose thread; any thread may call.
        spec: The model it works with, which stays loaded meanwhile.
        work: Yields where others may go on.
    """

    def begin() -> None:
        owner.open(spec)
        go_on()

    def go_on() -> None:
        try:
            if not future.cancelled():
                next(work)
                owner.call(go_on)
                return
            work.close()
        except StopIteration as done:
            found: T = done.value
            settle(future, lambda: found)
        except Exception as error:  # noqa: BLE001  told to the one who asked
            refuse(future, error)
        owner.let_go(spec.name)

    owner.call(lambda: attempt(begin, lambda error: refuse(future, error)))
