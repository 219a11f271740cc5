"""All that is wrong with a data set, to choose the row from."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from mlx_optiq_tui.finetune.data_words import count_words, lines_words

__all__ = ["ProblemList"]

_MOST = 5000


class ProblemList(ModalScreen[int | None]):
    """The screen's result is the index of a row to go to, None where it was left.

    Args:
        problems: By index of the row.
        besides: Of lines in files that became no rows.
    """

    DEFAULT_CSS = """
    ProblemList { align: center middle; }
    ProblemList > Vertical { width: 90%; height: 90%; background: $surface; border: round $primary;
                             padding: 0 1; }
    ProblemList OptionList { height: 1fr; border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape,q", "dismiss(None)", "Close")]

    def __init__(self, problems: Mapping[int, str], besides: Sequence[str]) -> None:
        super().__init__()
        self._problems, self._besides = problems, besides

    def compose(self) -> ComposeResult:
        """How many, and each."""
        rows = [
            Option(Text(f"row {index + 1:,}: {problem}"), id=str(index))
            for index, problem in list(self._problems.items())[:_MOST]
        ]
        lines = [Option(Text(f"not taken: {problem}")) for problem in self._besides[:_MOST]]
        with Vertical():
            yield Label(
                f"{count_words(len(self._problems))} to mend, {lines_words(len(self._besides))} not taken; "
                "Enter goes to a row, Escape closes"
            )
            yield OptionList(*rows, *lines)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Go to the row; a line that was not taken is in its file alone."""
        event.stop()
        if event.option_id is not None:
            self.dismiss(int(event.option_id))
