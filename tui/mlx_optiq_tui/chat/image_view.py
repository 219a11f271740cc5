"""A picture in the terminal, as well as the terminal can show one."""

from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

__all__ = ["ImageView"]


class ImageView(Vertical):
    """A preview over its label.

    Args:
        path: A picture that was decoded before; where it is gone, only the label is shown.
        label: What it is called.
    """

    DEFAULT_CSS = """
    ImageView { height: auto; width: auto; }
    ImageView .preview { width: auto; height: 7; max-width: 40; }
    ImageView .label { color: $text-muted; width: auto; }
    """

    def __init__(self, path: Path, label: str) -> None:
        super().__init__()
        self._path, self._label = path, label

    def compose(self) -> ComposeResult:
        """Picture and label."""
        # Imported late because it asks the terminal what it can show; ``app`` has done that before it runs.
        from textual_image.widget import Image

        widget: Any = Image
        if self._path.is_file():
            yield widget(str(self._path), classes="preview")
        yield Static(f"▣ {self._label}", classes="label", markup=False)
