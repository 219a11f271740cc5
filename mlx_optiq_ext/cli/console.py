"""What a command shows: progress on stderr, one result on stdout.

Knows nothing of what is being done; draws :class:`~mlx_optiq_ext.types.progress.Progress` values and prints
tables and JSON documents. Made by each command from its parsed arguments.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

import msgspec

from mlx_optiq_ext.progress_line import JsonProgress, ProgressLine
from mlx_optiq_ext.types.progress import Progress

__all__ = ["Console", "format_table"]


class Console:
    """Progress (:class:`~mlx_optiq_ext.progress_line.ProgressLine`) and result of one command.

    Belongs to the thread that made it.
    """

    def __init__(
        self,
        *,
        json_output: bool = False,
        quiet: bool = False,
        progress_json: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.json_output = json_output
        self._quiet = quiet
        self._out = out
        self._line: ProgressLine | JsonProgress = (
            JsonProgress(err, clock=clock) if progress_json else ProgressLine(err, quiet=quiet, clock=clock)
        )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Console":
        """Make the console that ``--json``, ``--quiet`` and ``--progress-json`` ask for."""
        return cls(
            json_output=getattr(args, "json", False),
            quiet=getattr(args, "quiet", False),
            progress_json=getattr(args, "progress_json", False),
        )

    @property
    def out(self) -> TextIO:
        """Where results go."""
        return self._out or sys.stdout

    def progress(self, event: Progress) -> None:
        """Draw one event: pass this method as the ``ProgressSink`` of a long job."""
        self._line(event)

    def note(self, text: str) -> None:
        """Write one line for the user on stderr."""
        self._line.note(text)

    def finding(self, document: Mapping[str, object], text: str) -> None:
        """Show on stderr what was found on the way: with ``--progress-json`` ``document``, else ``text``.

        Args:
            document: One JSON line; its first key says what it is.
            text: The same for people; ``--quiet`` leaves it out.
        """
        if isinstance(self._line, JsonProgress):
            self._line.write(document)
        elif not self._quiet:
            self._line.note(text)

    def result(self, document: object, text: str) -> None:
        """Print the command's one result: ``document`` as JSON with ``--json``, else ``text``.

        Args:
            document: Anything msgspec encodes: Structs, dicts, lists, numbers.
            text: The same for people.
        """
        self._line.end()
        if self.json_output:
            encoded = msgspec.json.format(msgspec.json.encode(document), indent=2)
            print(encoded.decode(), file=self.out, flush=True)
        else:
            print(text, file=self.out, flush=True)


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Lay out cells in aligned columns: the first column to the left, numbers to the right.

    Args:
        headers: One per column.
        rows: Cells as text; each row as long as ``headers``.
        title: Written above, where given.
    """
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    is_number = [
        bool(rows) and all(_looks_numeric(cell) for cell in column[1:]) and index > 0
        for index, column in enumerate(columns)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    lines = [line(headers), rule, *(line(row) for row in rows)]
    return "\n".join([title, *lines] if title else lines)


def _looks_numeric(cell: str) -> bool:
    return not cell.strip("–- ") or cell.lstrip("+-−×≤≥<~").replace(",", "")[:1].isdigit()
