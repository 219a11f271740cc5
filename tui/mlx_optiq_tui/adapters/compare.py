"""Two adapters' answers to one prompt, side by side, as they come."""

import time

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Button, Input, Select, Static

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.status import EngineStatus
from mlx_optiq_tui.lab import lab_of

__all__ = ["ComparePanel"]

_BASE = "base"
_SIDES = ("left", "right")
_MAX_TOKENS = 256


class _Side(Vertical):
    """One of the two: whose answer, and the answer."""

    def __init__(self, side: str) -> None:
        super().__init__(id=side)
        self.text = ""
        self._is_offered = False

    def compose(self) -> ComposeResult:
        """Choice above, answer below, figures last."""
        yield Select([(_BASE, _BASE)], value=_BASE, allow_blank=False, compact=True, classes="who")
        with VerticalScroll():
            yield Static(classes="answer", markup=False)
        yield Static(classes="figures", markup=False)

    def offer(self, names: list[str]) -> None:
        """Let these be chosen, and keep what is chosen while it can be."""
        who = self.query_one(Select)
        chosen = str(who.value)
        if not self._is_offered:
            # The two begin with different answers as soon as there are two.
            self._is_offered = len(names) > 1
            chosen = names[_SIDES.index(str(self.id)) % len(names)]
        who.set_options([(name, name) for name in names])
        who.value = chosen if chosen in names else names[0]

    def begin(self) -> str:
        """Empty the answer; whose it will be."""
        self.text = ""
        self.query_one(".answer", Static).update("…")
        self.query_one(".figures", Static).update("")
        return str(self.query_one(Select).value)

    def say(self, text: str) -> None:
        """Add to the answer."""
        self.text += text
        self.query_one(".answer", Static).update(self.text)

    def end(self, figures: str) -> None:
        """Show what it took, or what went wrong."""
        if not self.text:
            self.query_one(".answer", Static).update("")
        self.query_one(".figures", Static).update(figures)


class ComparePanel(Vertical):
    """A prompt and two answers."""

    DEFAULT_CSS = """
    ComparePanel #ask { height: 3; }
    ComparePanel #ask Input { width: 1fr; }
    ComparePanel #ask Button { width: auto; }
    ComparePanel #sides { height: 1fr; }
    ComparePanel _Side { width: 1fr; border: round $panel; padding: 0 1; }
    ComparePanel .answer { height: auto; }
    ComparePanel .figures { height: 1; color: $text-muted; }
    """

    class Said(Message):
        """A piece of one side's answer."""

        def __init__(self, side: str, text: str) -> None:
            super().__init__()
            self.side, self.text = side, text

    class Ended(Message):
        """One side is complete, or failed."""

        def __init__(self, side: str, figures: str) -> None:
            super().__init__()
            self.side, self.figures = side, figures

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self._names: list[str] = []

    def compose(self) -> ComposeResult:
        """The prompt above, the answers below."""
        with Horizontal(id="ask"):
            yield Input(placeholder="One prompt for both", id="prompt")
            yield Button("Ask", id="go", variant="primary")
        with Horizontal(id="sides"):
            for side in _SIDES:
                yield _Side(side)

    def show_status(self, status: EngineStatus) -> None:
        """Offer the adapters that are mounted, and the model without any."""
        names = [_BASE, *(each.name for each in status.adapters)]
        if names != self._names:
            self._names = names
            for side in self.query(_Side):
                side.offer(names)

    def on_input_submitted(self) -> None:
        """Ask both."""
        self.ask()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Ask both."""
        event.stop()
        self.ask()

    def ask(self) -> None:
        """Send the prompt to both sides; what still streams is stopped."""
        prompt = self.query_one("#prompt", Input).value.strip()
        if not prompt:
            self.query_one("#prompt").focus()
            return
        self.workers.cancel_node(self)
        for side in self.query(_Side):
            self._stream(str(side.id), prompt, side.begin())

    @work(group="compare")
    async def _stream(self, side: str, prompt: str, adapter: str) -> None:
        lab = lab_of(self)
        models = {each.name: each.model for each in lab.status.adapters} if lab.status else {}
        body = {
            "model": models.get(adapter, ""),
            "adapter": adapter,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": _MAX_TOKENS,
            "temperature": 0.0,
        }
        began = first = time.monotonic()
        try:
            async for delta in lab.client.chat(body):
                if delta.text or delta.reasoning:
                    first = first if first > began else time.monotonic()
                    self.post_message(self.Said(side, delta.reasoning + delta.text))
                if delta.usage is not None:
                    tokens, first_s = delta.usage.completion_tokens, first - began
                    rate = tokens / max(time.monotonic() - first, 1e-3)
                    figures = f"{tokens} tokens, first after {first_s:.1f} s, then {rate:.0f} a second"
                    self.post_message(self.Ended(side, figures))
        except OptiqError as error:
            self.post_message(self.Ended(side, str(error)))

    def on_compare_panel_said(self, message: Said) -> None:
        """Show it."""
        self.query_one(f"#{message.side}", _Side).say(message.text)

    def on_compare_panel_ended(self, message: Ended) -> None:
        """Show it."""
        self.query_one(f"#{message.side}", _Side).end(message.figures)
