"""Load a fast BLAS before MLX on Linux CPUs.

The mlx-cpu wheel bundles a reference BLAS; a fast one that is in the process first takes its place (the
symbols resolve globally) and makes float32 matmul 10 to 20 times faster. Call :func:`preload_blas` before
the first ``import mlx.core``. Knows nothing of MLX itself.
"""

import ctypes
import ctypes.util
import functools
import glob
import sys
import sysconfig
from pathlib import Path

__all__ = ["BLAS_HINT", "preload_blas"]

BLAS_HINT = "install one: `pip install 'mlx-optiq-ext[fast]'` (x86-64) or `apt install libopenblas0-pthread`"


def _candidates() -> list[str]:
    """Library names to try, best first."""
    prefix = Path(sysconfig.get_paths()["data"]) / "lib"
    mkl = sorted(glob.glob(str(prefix / "libmkl_rt.so*")), reverse=True)
    return ["libopenblas.so.0", "libopenblas.so", *mkl, "libmkl_rt.so.2", "libmkl_rt.so"]


@functools.cache
def preload_blas() -> str | None:
    """Load the first fast BLAS found, globally, and return its name; None where none is found or needed.

    Does nothing outside Linux. Returns ``"late: NAME"`` where MLX was imported before, since the library
    then has no effect.
    """
    if sys.platform != "linux":
        return None
    late = "mlx.core" in sys.modules
    for name in _candidates():
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return f"late: {name}" if late else name
    return None
