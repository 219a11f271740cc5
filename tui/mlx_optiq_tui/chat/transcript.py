"""The conversation as it is read: questions, answers as they come, calls and their results.

Widgets that draw values of ``conversation``; they know no server and no file but the pictures they are given.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Collapsible, Markdown, Static

from mlx_optiq_tui.chat.conversation import (
    AnswerStats,
    AssistantMessage,
    ChatMessage,
    StoredImage,
    ToolMessage,
    ToolUse,
    UserMessage,
    named,
)
from mlx_optiq_tui.chat.image_view import ImageView
from mlx_optiq_tui.chat.long_text import LongText, split_after
from mlx_optiq_tui.chat.plain import plain, plainest
from mlx_optiq_tui.chat.tools import shown_arguments
from mlx_optiq_tui.chat_stream import ChatDelta
from mlx_optiq_tui.question import Question

__all__ = [
    "FORMATTED_LINES",
    "AnswerView",
    "ErrorView",
    "QuestionView",
    "ToolView",
    "Transcript",
    "conversation_views",
    "stats_line",
]

FORMATTED_LINES = 120
"""Of an answer, and of the answers of a conversation that is opened, the newest first."""
_LINE_CHARACTERS = 200
_UNFORMATTED = "… as it was written from here on: too long to format"

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
        yield LongText(self._message.text)


class AnswerView(Vertical):
    """What the model says: thoughts folded, text, and what it cost.

    Markdown makes a widget of every paragraph and list item, and with thousands of them no key would be
    answered for minutes: so only a beginning is formatted.

    Args:
        message: A whole answer; None where it will come in pieces.
        lines: How many of them are formatted.
    """

    DEFAULT_CSS = """
    AnswerView { height: auto; margin: 1 0 0 0; }
    AnswerView Collapsible { height: auto; border: none; padding: 0; background: $background; }
    AnswerView CollapsibleTitle { color: $text-muted; padding: 0 1; }
    AnswerView .thoughts { color: $text-muted; padding: 0 2; }
    AnswerView Markdown { height: auto; padding: 0 1; margin: 0; background: $background; }
    AnswerView MarkdownBlock:last-child { margin-bottom: 0; }
    AnswerView .tail { padding: 0 1; }
    AnswerView .cost { color: $text-muted; padding: 0 1; }
    """

    def __init__(self, message: AssistantMessage | None = None, lines: int = FORMATTED_LINES) -> None:
        super().__init__()
        self._message = message
        self._thought_words = 0
        self._lines, self._characters = lines, lines * _LINE_CHARACTERS
        self._has_head = self._is_cut = False

    def compose(self) -> ComposeResult:
        """Thoughts, text, cost."""
        head, tail = self._formatted(self._message.text if self._message else "")
        thoughts = self._message.reasoning.strip() if self._message else ""
        self._thought_words = len(thoughts.split())
        with Collapsible(title=self._thoughts_title(done=True), collapsed=True):
            yield LongText(thoughts, classes="thoughts")
        yield Markdown(plain(head), open_links=False)
        yield Static(_UNFORMATTED, classes="cost unformatted", markup=False)
        yield LongText(tail, classes="tail")
        yield Static(classes="cost end", markup=False)

    def on_mount(self) -> None:
        """Show what is there."""
        self.query_one(Collapsible).display = bool(self._thought_words)
        self.query_one(".unformatted").display = self._is_cut
        if self._message is not None:
            self.finish(self._message)
        else:
            self.query_one(".end", Static).update("…")
            self._stream = Markdown.get_stream(self.query_one(Markdown))

    async def add(self, delta: ChatDelta) -> None:
        """Show a piece."""
        if delta.reasoning:
            self._thought_words += len(delta.reasoning.split())
            folded = self.query_one(Collapsible)
            folded.display = True
            folded.title = self._thoughts_title(done=False)
            self.query_one(".thoughts", LongText).add(delta.reasoning)
        head, tail = self._formatted(delta.text)
        if head:
            await self._stream.write(plain(head))
        if tail:
            self.query_one(".tail", LongText).add(tail)

    def _formatted(self, text: str) -> tuple[str, str]:
        """What of a text that comes next is Markdown, and what is shown as it was written."""
        head, tail = split_after(text, self._lines, self._characters) if self._lines > 0 else ("", text)
        self._lines -= head.count("\n")
        self._characters -= len(head)
        self._has_head |= bool(head)
        if tail and not self._is_cut:
            self._is_cut, self._lines = True, 0
            if self.is_mounted:
                self.query_one(".unformatted").display = True
        return head, tail

    async def end(self, message: AssistantMessage) -> None:
        """All has come."""
        await self._stream.stop()
        self.finish(message)

    def finish(self, message: AssistantMessage) -> None:
        """Say what it cost."""
        self.query_one(Collapsible).title = self._thoughts_title(done=True)
        self.query_one(Markdown).display = self._has_head
        self.query_one(".end", Static).update(plain(stats_line(message)))

    def toggle_thoughts(self) -> None:
        """Unfold or fold them."""
        folded = self.query_one(Collapsible)
        folded.collapsed = not folded.collapsed

    @work(exclusive=True, group="link")
    async def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """Open pages of the web, asked first: the words of a link need not say where it leads."""
        event.stop()
        try:
            is_page = urlsplit(event.href).scheme in ("http", "https")
        except ValueError:  # no address at all
            is_page = False
        if not is_page:
            self.notify(plainest(event.href), title="Not opened: no page of the web")
        elif await self.app.push_screen_wait(Question(f"Open {plainest(event.href)} ?", yes="Open")):
            self.app.open_url(event.href)

    def _thoughts_title(self, *, done: bool) -> str:
        return f"Thought: {self._thought_words} words" if done else f"Thinking … {self._thought_words} words"


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
        title = plain(f"{self._told.name} {_OUTCOMES[self._told.outcome]}: {first[0][:60] if first else ''}")
        with Collapsible(title=title.replace("[", "\\["), collapsed=True):
            if self._call is not None:
                yield Static(plainest(shown_arguments(self._call)), markup=False)
            yield LongText(self._told.text)


class ErrorView(Static):
    """What went wrong, in the words of who says it."""

    DEFAULT_CSS = """
    ErrorView { margin: 1 0 0 0; border-left: thick $error; padding: 0 1; color: $error; }
    """

    def __init__(self, words: str) -> None:
        super().__init__(plain(f"✕ {words}"), markup=False)


def conversation_views(
    messages: Sequence[ChatMessage], shown: Callable[[tuple[StoredImage, ...]], list[tuple[Path, str]]]
) -> list[Widget]:
    """A widget for each message; the newest answers are formatted.

    Args:
        messages: All of them.
        shown: Path and label of pictures.
    """
    lines, formatted = FORMATTED_LINES, list[int]()
    for message in reversed(messages):
        formatted.append(lines)
        if isinstance(message, AssistantMessage):
            lines = max(0, lines - message.text.count("\n") - 1)
    views, calls = list[Widget](), dict[str, ToolUse]()
    for message, most in zip(messages, reversed(formatted), strict=True):
        if isinstance(message, UserMessage):
            views.append(QuestionView(message, shown(message.images)))
        elif isinstance(message, AssistantMessage):
            calls.update({call.id: call for call in message.tool_calls})
            views.append(AnswerView(message, most))
        else:
            views.append(ToolView(calls.get(message.call_id), message))
    return views


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
