"""Ask whether a tool may do what the model wants, with all that it would do in sight.

Not a dialog over the screen, and without letter keys: what is being typed elsewhere must never become an
answer.
"""

import asyncio
import time
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Static

from mlx_optiq_tui.chat.conversation import ToolUse
from mlx_optiq_tui.chat.plain import plainest
from mlx_optiq_tui.chat.tools import SANDBOXED, TOOLS, shown_arguments
from mlx_optiq_tui.chat.turn import Decision

__all__ = ["ConsentBox"]

_SEEN, _WIDTH = 5, 70
"""Lines of a call that a small terminal shows at once, and their width."""
_HASTY_S = 0.4
"""An answer that comes sooner was meant for the question before."""


class ConsentBox(Vertical):
    """Hidden until something is asked. Arrow keys choose, Enter answers; refusing has the focus."""

    DEFAULT_CSS = """
    ConsentBox { height: auto; background: $surface; border: round $warning;
                 padding: 0 1; display: none; }
    ConsentBox.-asking { display: block; }
    ConsentBox VerticalScroll { height: auto; max-height: 12; background: $panel; margin: 0; }
    ConsentBox #what { padding: 0 1; }
    ConsentBox Horizontal { height: 1; margin-top: 1; }
    ConsentBox Button { margin-right: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "app.focus_previous", "Previous", show=False),
        Binding("right", "app.focus_next", "Next", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._answer: asyncio.Future[Decision] | None = None
        self._asked = 0.0

    def compose(self) -> ComposeResult:
        """Question, arguments, answers."""
        yield Static(id="question", markup=False)
        with VerticalScroll(can_focus=True):
            yield Static(id="what", markup=False)
        with Horizontal():
            yield Button("Refuse", id="refuse", compact=True)
            yield Button("Allow once", id="once", variant="warning", compact=True)
            yield Button("Allow in this conversation", id="conversation", variant="warning", compact=True)

    @property
    def is_asking(self) -> bool:
        """Whether an answer is waited for."""
        return self._answer is not None

    async def ask(self, call: ToolUse) -> Decision:
        """Show a call and wait for the answer."""
        where = "in the sandbox" if call.name in SANDBOXED else "from this machine, over the network"
        title = TOOLS[call.name].title if call.name in TOOLS else call.name
        what = plainest(shown_arguments(call))
        lines = what.splitlines()
        is_long = sum(1 + len(line) // _WIDTH for line in lines) > _SEEN
        extent = f" ({len(lines)} lines; scroll to read all)" if is_long else ""
        self.query_one("#question", Static).update(f"The model wants to use {title}, {where}{extent}:")
        self.query_one("#what", Static).update(what)
        self.query_one(VerticalScroll).scroll_home(animate=False)
        self._asked = time.monotonic()
        self._answer = asyncio.get_running_loop().create_future()
        self.add_class("-asking")
        try:
            return await self._answer
        finally:
            self._answer = None
            self.remove_class("-asking")

    def take_focus(self) -> None:
        """Let the keyboard answer; a hasty Enter refuses."""
        self.query_one("#refuse", Button).focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer."""
        event.stop()
        decisions: dict[str | None, Decision] = {
            "refuse": "refuse",
            "once": "once",
            "conversation": "conversation",
        }
        decision = decisions[event.button.id]
        if decision != "refuse" and time.monotonic() - self._asked < _HASTY_S:
            return
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(decision)
