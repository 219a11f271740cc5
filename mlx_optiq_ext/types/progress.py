"""Progress of long work, as plain values; drawn by the caller."""

from collections.abc import Callable
from typing import TypeAlias

import msgspec

__all__ = ["Progress", "ProgressSink", "ignore_progress"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a long job."""

    stage: str
    """Short verb phrase: ``measure``, ``correct``, ``write``."""
    done: int
    total: int
    detail: str = ""
    replayed: int = 0
    """How many of ``done`` an earlier run finished: they took no time, and say nothing of the time left."""
    note: str = ""
    """A line to show once and to keep, such as what is continued from where."""
    values: dict[str, float] = {}
    """Figures of the work by name, such as ``loss``: for programs; people read ``detail``."""


ProgressSink: TypeAlias = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Drop every event: the default sink."""
