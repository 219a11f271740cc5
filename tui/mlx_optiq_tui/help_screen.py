"""What one can do here: the screen's own words, and every key that works on it now."""

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import ActiveBinding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Markdown

__all__ = ["HelpScreen", "key_list", "shown_bindings"]


class HelpScreen(ModalScreen[None]):
    """A page over the screen that it explains; any of its keys closes it.

    Args:
        text: Markdown.
    """

    DEFAULT_CSS = """
    HelpScreen { align: center middle; }
    HelpScreen VerticalScroll { width: 76; max-width: 100%; height: auto; max-height: 90%;
                                background: $surface; border: round $primary; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,question_mark,f9", "dismiss", "Close")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The page."""
        with VerticalScroll():
            yield Markdown(self._text)


def shown_bindings(screen: Screen[Any]) -> list[ActiveBinding]:
    """What can be done on a screen now, one entry for each action, nearest to the focus first.

    How every table and text field is moved in is left out.
    """
    seen: dict[tuple[int, str], ActiveBinding] = {}
    for active in screen.active_bindings.values():
        kind = type(active.node)
        is_ours = not kind.__module__.startswith("textual.") and "BINDINGS" in vars(kind)
        if is_ours and active.enabled and active.binding.description and not active.binding.system:
            seen.setdefault((id(active.node), active.binding.action), active)
    return list(seen.values())


def key_list(screen: Screen[Any]) -> str:
    """The keys of a screen as a Markdown list; those that choose screens are left out."""
    return "\n".join(
        f"- `{screen.app.get_key_display(active.binding)}` {active.binding.description}"
        for active in shown_bindings(screen)
        if not active.binding.action.startswith("open(")
    )
