"""Where the dashboard keeps what is this user's: conversations, drafts.

Source: XDG Base Directory Specification; macOS File System Programming Guide.
"""

import os
import sys
from pathlib import Path

__all__ = ["user_folder"]


def user_folder() -> Path:
    """The folder; made by who keeps something there."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        named = os.environ.get("XDG_DATA_HOME", "")
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".local" / "share"
    return base / "mlx-optiq-ext"
