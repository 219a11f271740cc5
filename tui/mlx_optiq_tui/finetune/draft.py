"""Rows that are not saved as a data set yet, kept over the end of the dashboard, also an unwanted one.

One file for each user; it appears complete or not at all. Called by the data pane.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from mlx_optiq_ext.formats.atomic import write_bytes_atomic
from mlx_optiq_tui.finetune.rows import Method, Row
from mlx_optiq_tui.user_folder import user_folder

__all__ = ["Draft", "draft_file", "forget_draft", "keep_draft", "read_draft"]


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What was being written."""

    method: Method
    rows: list[Row]


def draft_file() -> Path:
    """Where this user's draft is kept, beside the conversations."""
    return user_folder() / "dataset-draft.json"


def read_draft() -> Draft | None:
    """The draft of last time; None where there is none, or none that can be read."""
    try:
        return msgspec.json.decode(draft_file().read_bytes(), type=Draft)
    except (OSError, msgspec.MsgspecError):
        return None


def keep_draft(method: Method, rows: Sequence[Row]) -> None:
    """Keep rows; none: forget the draft.

    Raises:
        OSError: The file cannot be written.
    """
    if not rows:
        forget_draft()
        return
    file = draft_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_bytes_atomic(file, msgspec.json.encode(Draft(method=method, rows=list(rows))))


def forget_draft() -> None:
    """The rows were saved, or given up."""
    with suppress(OSError):
        draft_file().unlink(missing_ok=True)
