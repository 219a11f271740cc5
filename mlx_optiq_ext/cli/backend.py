"""Which back end of MLX is installed, and whether its library is the one that lies in place.

On Linux the wheels mlx-cpu, mlx-cuda-12 and mlx-cuda-13 all bring ``mlx/lib/libmlx.so``: the one that was
installed last is the one that runs, whatever the list of packages says. Needs no MLX. Called by
``optiq doctor``.
"""

import importlib.metadata
from importlib.metadata import Distribution, PackagePath
from pathlib import Path

from mlx_optiq_ext.cli.health import Finding

__all__ = ["BACK_ENDS", "check_back_end", "import_fix"]

BACK_ENDS = {"mlx-cuda-13": "CUDA 13", "mlx-cuda-12": "CUDA 12", "mlx-cpu": "CPU", "mlx-metal": "Metal"}
"""Distributions that bring a back end, the preferred first, and what they are."""

_LIBRARIES = ("libmlx.so", "libmlx.dylib")
_NAME = "back end"


def check_back_end() -> Finding:
    """Name the back end whose library is in place, and say where another one's is missing or covered."""
    installed = {name: package for name in BACK_ENDS if (package := _distribution(name)) is not None}
    if not installed:
        return Finding(name=_NAME, state="note", found="no wheel of a back end: MLX was built here")
    listed = ", ".join(f"{name} {package.version}" for name, package in installed.items())
    wanted = next(iter(installed))
    active = [name for name, package in installed.items() if _lies_in_place(package)]
    if not active:
        found = f"{listed} installed, but no library of it is in place"
        return Finding(name=_NAME, state="broken", found=found, fix=_reinstall(installed[wanted]))
    found = f"{BACK_ENDS[active[0]]}, of {listed}"
    if len(installed) > 1:
        found += ": one library for all, removing either package breaks MLX"
    if active[0] != wanted:
        return Finding(name=_NAME, state="note", found=found, fix=_reinstall(installed[wanted]))
    return Finding(name=_NAME, state="ok", found=found)


def import_fix(message: str) -> str:
    """What helps where MLX does not start.

    Args:
        message: Of the import's error.
    """
    cpu, mlx = _distribution("mlx-cpu"), _distribution("mlx")
    if "libcuda" in message:
        version = f"=={mlx.version}" if mlx else ""
        return (
            "the CUDA back end needs the NVIDIA driver: install it, or go back to the CPU with "
            f"`pip uninstall mlx-cuda-13 mlx-cuda-12` and `pip install --force-reinstall --no-deps "
            f"mlx-cpu{version}`"
        )
    return _reinstall(cpu) if "libmlx" in message and cpu else "reinstall mlx"


def _distribution(name: str) -> Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lies_in_place(package: Distribution) -> bool:
    """Whether the file under the library's name is this package's own, told by its recorded bytes."""
    library = _library(package)
    if library is None:
        return False
    try:
        return Path(str(library.locate())).stat().st_size == library.size
    except OSError:
        return False


def _library(package: Distribution) -> PackagePath | None:
    return next((file for file in package.files or () if file.name in _LIBRARIES), None)


def _reinstall(package: Distribution) -> str:
    return f"pip install --force-reinstall --no-deps {package.name}=={package.version}"
