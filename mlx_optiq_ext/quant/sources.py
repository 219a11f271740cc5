"""Identify the code that measures, so that results of other code are never continued.

The version alone does not: it stays the same between two commits. Knows nothing of journals; called by
``journal``.
"""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mlx_optiq_ext import __version__

__all__ = ["measuring_code", "sources_hash"]

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("measure", "models", "quant", "types")
_LIBRARIES = ("mlx", "mlx-lm", "numpy")


@cache
def measuring_code() -> str:
    """This package's version, a hash of its measuring sources, and the versions of what they compute with.

    Returns:
        The same text for the life of the process.
    Cost: reads under a hundred small files, once.
    """
    versions = [__version__, *(version(name) for name in _LIBRARIES)]
    sources = sources_hash([_PACKAGE / folder for folder in _FOLDERS])
    return " ".join([*versions, sources])


def sources_hash(folders: list[Path]) -> str:
    """SHA-256 of the names and contents of all Python files in ``folders``, whatever order they lie in.

    Args:
        folders: Not searched below their first level; names count without what is above them.
    """
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.parent.name}/{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
