"""Write what was chosen: where to, against what it is scored, and what came out.

Tells the screen by messages what is to be started; knows results, no process.
"""

from typing import Any

import msgspec
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Button, Input, Label, Static

from mlx_optiq_ext.types.figures import plus_minus
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_ext.types.score import ScoreReport
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.table import draw_table

__all__ = ["ConvertPane", "score_table"]


class ConvertPane(VerticalScroll):
    """Output, scoring, report."""

    DEFAULT_CSS = """
    ConvertPane { padding: 0 1; }
    ConvertPane Horizontal { height: 1; }
    ConvertPane Label { width: 20; color: $text-muted; }
    ConvertPane Input { width: 1fr; }
    ConvertPane Button { margin-right: 2; }
    ConvertPane #plan { height: auto; margin-bottom: 1; }
    ConvertPane #buttons { margin: 1 0; }
    ConvertPane #command { height: auto; color: $text-muted; margin-bottom: 1; }
    ConvertPane #result { height: auto; }
    """

    class Asked(Message):
        """A button was pressed: ``convert``, ``score`` or ``report``."""

        def __init__(self, step: str) -> None:
            super().__init__()
            self.step = step

    class Renamed(Message):
        """Another folder is to be written."""

    def __init__(self) -> None:
        super().__init__()
        self._proposed = ""

    def compose(self) -> ComposeResult:
        """Fields, buttons, command, result."""
        yield Static("Choose a budget first (b).", id="plan", markup=False)
        with Horizontal():
            yield Label("Output folder")
            yield Input(id="out", compact=True)
        with Horizontal():
            yield Label("Score against")
            yield Input("4,5,6", id="uniform", placeholder="uniform choices, such as 4,5g32", compact=True)
        with Horizontal(id="buttons"):
            yield Button("Convert (w)", id="convert", variant="primary", compact=True)
            yield Button("Score (s)", id="score", compact=True)
            yield Button("Report (o)", id="report", compact=True)
        yield Static(id="command", markup=False)
        yield Static(id="result", markup=False)

    @property
    def out(self) -> str:
        """Folder to make, or made."""
        return self.query_one("#out", Input).value.strip()

    @property
    def uniform(self) -> str:
        """Choices to score against; may be empty."""
        return self.query_one("#uniform", Input).value.strip()

    def plan(self, words: str, out: str) -> None:
        """Show what would be written, and where.

        Args:
            words: One line.
            out: Folder, unless the user named another.
        """
        self.query_one("#plan", Static).update(words)
        if self.out in ("", self._proposed):
            self.query_one("#out", Input).value = out
        self._proposed = out
        self.post_message(self.Renamed())

    def show_command(self, line: str) -> None:
        """Show what Convert runs."""
        self.query_one("#command", Static).update(line)

    @on(Input.Changed, "#out")
    def _renamed(self) -> None:
        self.post_message(self.Renamed())

    def show(self, text: str) -> None:
        """Draw what came out."""
        self.query_one("#result", Static).update(text)

    def show_conversion(self, result: Any) -> None:
        """Draw the result of ``optiq convert``."""
        if result.get("score"):
            self.show_score(result["score"])
        else:
            self.show(f"written to {result['out']}")

    def show_score(self, document: Any) -> None:
        """Draw a score from a command's result."""
        score = msgspec.convert(document, ScoreReport)
        width = max(self.content_size.width, 60)
        self.show(draw_table(score_table(score), Style(width=width)))

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Asked(event.button.id or ""))


def score_table(score: ScoreReport) -> TextTable:
    """Size, divergence and agreement of every row of a score."""
    return TextTable(
        title=f"Measured on {score.held_out.num_tokens} held-out tokens, against {score.reference}",
        columns=("stored as", "bits/weight", "size", "KL, nats/token", "top-1"),
        rows=tuple(
            (
                row.label,
                f"{row.bpw:.3f}",
                format_nbytes(row.nbytes),
                plus_minus(row.divergence, row.divergence_half_width),
                f"{row.top1:.1%}",
            )
            for row in score.rows
        ),
        highlight=next((index for index, row in enumerate(score.rows) if row.role == "candidate"), None),
        note="± is a 95 % interval; uniform rows are rounded plainly, as stock mlx-lm does.",
    )
