"""The API key of a server: from a file, else from the variable OPTIQ_API_KEY.

Called by ``optiq serve`` and by commands that talk to one.
"""

import os
from pathlib import Path

from mlx_optiq_ext.errors import UsageError

__all__ = ["read_api_key"]

_VARIABLE = "OPTIQ_API_KEY"


def read_api_key(file: str | None) -> str | None:
    """The key; None where there is none, or an empty variable.

    Raises:
        UsageError: The file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(_VARIABLE, "").strip() or None
    try:
        key = Path(file).expanduser().read_text("utf-8").strip()
    except OSError as error:
        raise UsageError(f"--api-key-file {file}: {error.strerror}") from error
    if not key:
        raise UsageError(f"--api-key-file {file} is empty")
    return key
