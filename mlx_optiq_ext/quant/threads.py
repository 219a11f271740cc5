"""Work on ranges of rows, one thread per core, with NumPy's own BLAS threads out of the way.

Threads inside threads spin for each other and cost several times the work where cores are few or shared.
Knows nothing of what the work is.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

__all__ = ["in_threads", "single_blas_thread"]

_T = TypeVar("_T")
_PREFIXES = ("scipy_openblas", "openblas")


def in_threads(work: Callable[[tuple[int, int]], _T], spans: Sequence[tuple[int, int]]) -> list[_T]:
    """Do ``work`` on every range of rows and return the results in order.

    Args:
        work: Must spend its time in NumPy, which lets threads run at once, and touch no MLX array.
    """
    num_threads = min(len(spans), os.cpu_count() or 1)
    if num_threads < 2:
        return [work(span) for span in spans]
    with single_blas_thread(), ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, spans))


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Let NumPy's matrix products use one thread each; no effect where its BLAS is not a bundled OpenBLAS."""
    controls = _openblas()
    if controls is None:
        yield
        return
    read, write = controls
    before = read()
    write(1)
    try:
        yield
    finally:
        write(before)


@functools.cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Getter and setter of the thread count of the OpenBLAS in NumPy's wheel."""
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for path in sorted(folder.glob("*openblas*.so*")):
        library = ctypes.CDLL(str(path))
        for prefix in _PREFIXES:
            for suffix in ("64_", ""):
                read = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                write = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if read is not None and write is not None:
                    return read, write
    return None
