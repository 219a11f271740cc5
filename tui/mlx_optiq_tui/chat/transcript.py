"""The conversation as it is read: questions, answers as they come, calls and their results.

Widgets that draw values of ``conversation``; they know no server and no file but the pictures they are given.
"""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Collapsible, Markdown, Static

from mlx_optiq_tui.chat.conversation import (
    AnswerStats,
    AssistantMessage,
    ToolMessage,
    ToolUse,
    UserMessage,
    named,
)
from mlx_optiq_tui.chat.image_view import ImageView
from mlx_optiq_tui.chat.tools import shown_arguments
from mlx_optiq_tui.chat_stream import ChatDelta

__all__ = ["AnswerView", "ErrorView", "QuestionView", "ToolView", "Transcript", "stats_line"]

_OUTCOMES = {"ran": "✓ ran", "refused": "✕ refused", "failed": "✕ failed"}
_ENDS = {
    "length": "token limit",
    "stopped": "stopped",
    "": "broke off",
}


class Transcript(VerticalScroll):
    """Scrolls along with what comes, until somebody scrolls up."""

    DEFAULT_CSS = """
    Transcript { height: 1fr; padding: 0 1; }
    """


class QuestionView(Vertical):
    """What was typed.

    Args:
        message: Text and pictures.
        pictures: Path and label of each picture.
    """

    DEFAULT_CSS = """
    QuestionView { height: auto; margin: 1 0 0 0; border-left: thick $primary; padding: 0 1;
                   background: $surface; }
    QuestionView Horizontal { height: auto; }
    QuestionView ImageView { margin-right: 2; }
    """

    def __init__(self, message: UserMessage, pictures: Sequence[tuple[Path, str]]) -> None:
        super().__init__()
        self._message, self._pictures = message, pictures

    def compose(self) -> ComposeResult:
        """Pictures over text."""
        if self._pictures:
            with Horizontal():
                for path, label in self._pictures:
                    yield ImageView(path, label)
        yield Static(self._message.text, markup=False)


class AnswerView(Vertical):
    """What the model says: thoughts folded, text, and what it cost.

    Args:
        message: A whole answer; None where it will come in pieces.
    """

    DEFAULT_CSS = """
    AnswerView { height: auto; margin: 1 0 0 0; }
    AnswerView Collapsible { height: auto; border: none; padding: 0; background: $background; }
    AnswerView CollapsibleTitle { color: $text-muted; padding: 0 1; }
    AnswerView .thoughts { color: $text-muted; padding: 0 2; }
    AnswerView Markdown { height: auto; padding: 0 1; margin: 0; background: $background; }
    AnswerView MarkdownBlock:last-child { margin-bottom: 0; }
    AnswerView .cost { color: $text-muted; padding: 0 1; }
    """

    def __init__(self, message: AssistantMessage | None = None) -> None:
        super().__init__()
        self._message = message
        self._thoughts: list[str] = [message.reasoning] if message and message.reasoning else []

    def compose(self) -> ComposeResult:
        """Thoughts, text, cost."""
        with Collapsible(title=self._thoughts_title(done=True), collapsed=True):
            yield Static(classes="thoughts", markup=False)
        yield Markdown(self._message.text if self._message else "", open_links=False)
        yield Static(classes="cost", markup=False)

    def on_mount(self) -> None:
        """Show what is there."""
        self.query_one(Collapsible).display = bool(self._thoughts)
        if self._message is not None:
            self.finish(self._message)
        else:
            self.query_one(".cost", Static).update("…")
            self._stream = Markdown.get_stream(self.query_one(Markdown))

    async def add(self, delta: ChatDelta) -> None:
        """Show a piece."""
        if delta.reasoning:
            self._thoughts.append(delta.reasoning)
            folded = self.query_one(Collapsible)
            folded.display = True
            folded.title = self._thoughts_title(done=False)
            self._draw_thoughts()
        if delta.text:
            await self._stream.write(delta.text)

    async def end(self, message: AssistantMessage) -> None:
        """All has come."""
        await self._stream.stop()
        self.finish(message)

    def finish(self, message: AssistantMessage) -> None:
        """Say what it cost."""
        self.query_one(Collapsible).title = self._thoughts_title(done=True)
        self.query_one(Markdown).display = bool(message.text)
        self.query_one(".cost", Static).update(stats_line(message))

    def toggle_thoughts(self) -> None:
        """Unfold or fold them."""
        folded = self.query_one(Collapsible)
        folded.collapsed = not folded.collapsed

    def on_collapsible_expanded(self) -> None:
        """Draw them when they are seen."""
        self._draw_thoughts()

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """Open pages of the web; nothing else that a model may write as a link."""
        event.stop()
        if urlsplit(event.href).scheme in ("http", "https"):
            self.app.open_url(event.href)
        else:
            self.notify(event.href, title="Not opened: no page of the web", markup=False)

    def _draw_thoughts(self) -> None:
        if not self.query_one(Collapsible).collapsed:
            self.query_one(".thoughts", Static).update("".join(self._thoughts).strip())

    def _thoughts_title(self, *, done: bool) -> str:
        words = len("".join(self._thoughts).split())
        return f"Thought: {words} words" if done else f"Thinking … {words} words"


class ToolView(Vertical):
    """A call and what became of it.

    Args:
        call: What the model asked for; None where that is not known.
        told: The result.
    """

    DEFAULT_CSS = """
    ToolView { height: auto; margin: 1 0 0 0; border-left: thick $secondary; padding: 0 1; }
    ToolView Collapsible { height: auto; border: none; padding: 0; background: $background; }
    ToolView Static { padding: 0 2; }
    """

    def __init__(self, call: ToolUse | None, told: ToolMessage) -> None:
        super().__init__()
        self._call, self._told = call, told

    def compose(self) -> ComposeResult:
        """Folded but for its first line."""
        first = self._told.text.strip().splitlines()[:1]
        title = f"{self._told.name} {_OUTCOMES[self._told.outcome]}: {first[0][:60] if first else ''}"
        with Collapsible(title=title.replace("[", "\\["), collapsed=True):
            if self._call is not None:
                yield Static(shown_arguments(self._call), markup=False)
            yield Static(self._told.text, markup=False)


class ErrorView(Static):
    """What went wrong, in the words of who says it."""

    DEFAULT_CSS = """
    ErrorView { margin: 1 0 0 0; border-left: thick $error; padding: 0 1; color: $error; }
    """

    def __init__(self, words: str) -> None:
        super().__init__(f"✕ {words}", markup=False)


def stats_line(message: AssistantMessage) -> str:
    """What an answer cost, on one line; what is not known is left out."""
    stats: AnswerStats = message.stats
    parts = [named(message.settings)]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tok/s")
    if stats.first_token_s is not None:
        parts.append(f"first token {stats.first_token_s:.2f} s")
    if stats.prompt_tokens is not None:
        parts.append(f"{stats.prompt_tokens} in, {stats.cached_tokens} cached")
    if stats.completion_tokens is not None:
        parts.append(f"{stats.completion_tokens} out")
    parts.append(_ENDS.get(message.end, ""))
    return " · ".join(part for part in parts if part)
