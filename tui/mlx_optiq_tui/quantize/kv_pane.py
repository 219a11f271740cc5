"""Choose the bits of the KV cache: what is measured, at which budget, and what every layer then stores.

Tells the screen by a message that it is to be started; knows results, no process.
"""

from pathlib import Path
from typing import Any

import msgspec
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Button, Input, Label, Static

from mlx_optiq_ext.errors import UsageError
from mlx_optiq_ext.types.kv import KVConfig, cache_name
from mlx_optiq_ext.types.options import KVCacheOptions
from mlx_optiq_ext.types.report import TextTable
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.quantize.commands import kv_words
from mlx_optiq_tui.table import draw_table
from mlx_optiq_tui.widgets.option_form import OptionForm

__all__ = ["KVPane", "kv_table"]

_OPTIONS = ("target_bits", "context", "num_tokens", "recent", "rotate")


class _Result(msgspec.Struct, frozen=True):
    """What is read of ``optiq kv-cache --json``."""

    config: KVConfig
    config_file: str


class KVPane(VerticalScroll):
    """Model, folder, options; a table of layers."""

    DEFAULT_CSS = """
    KVPane { padding: 0 1; }
    KVPane > Horizontal { height: 1; }
    KVPane Label { width: 20; color: $text-muted; }
    KVPane > Horizontal Input { width: 1fr; }
    KVPane #kv-start-row { margin: 1 0; }
    KVPane #kv-result { height: auto; }
    """

    class Asked(Message):
        """The cache is to be measured and chosen."""

    def __init__(self) -> None:
        super().__init__()
        self._proposed = ("", "")
        self._written = ""

    def compose(self) -> ComposeResult:
        """Fields, options, button, result."""
        with Horizontal():
            yield Label("Model to serve")
            yield Input(id="kv-model", placeholder="folder or Hub id, quantized or not", compact=True)
        with Horizontal():
            yield Label("Output folder")
            yield Input(id="kv-out", placeholder="for kv_config.json", compact=True)
        yield OptionForm((KVCacheOptions, _OPTIONS), id="kv-options")
        with Horizontal(id="kv-start-row"):
            yield Button("Measure and choose", id="kv-start", variant="primary", compact=True)
        yield Static(id="kv-result", markup=False)

    @property
    def model(self) -> str:
        """What is measured."""
        return self.query_one("#kv-model", Input).value.strip()

    def words(self) -> tuple[str, ...]:
        """The command; it replaces only what an earlier one of this pane wrote.

        Raises:
            UsageError: A field is empty, or an option is out of bounds.
        """
        out = self.query_one("#kv-out", Input).value.strip()
        if not self.model or not out:
            raise UsageError("name the model to serve and the folder to write into (k)")
        flags = self.query_one("#kv-options", OptionForm).flags()
        return kv_words(self.model, out, (*(("--force",) if out == self._written else ()), *flags))

    def propose(self, model: str, out: str) -> None:
        """Fill the fields that the user left as they were.

        Args:
            model: To measure.
            out: Folder.
        """
        for name, before, value in zip(("#kv-model", "#kv-out"), self._proposed, (model, out), strict=True):
            field = self.query_one(name, Input)
            if field.value.strip() in ("", before):
                field.value = value
        self._proposed = (model, out)

    def show(self, document: Any) -> float:
        """Draw what was chosen.

        Args:
            document: Result of the command.
        Returns:
            Stored bits per cached number.
        """
        result = msgspec.convert(document, _Result)
        self._written = str(Path(result.config_file).parent)
        width = max(self.content_size.width, 60)
        drawn = draw_table(kv_table(result.config), Style(width=width))
        self.query_one("#kv-result", Static).update(f"{drawn}\nwritten to {result.config_file}")
        return result.config.bits_per_number

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Asked())


def kv_table(config: KVConfig) -> TextTable:
    """What every layer stores."""
    return TextTable(
        title=f"{config.bits_per_number:.2f} bits per cached number, {config.bytes_per_token:,.0f} bytes per "
        f"token at {config.context:,} tokens: {config.chosen}",
        columns=("layer", "keys", "values"),
        rows=tuple(
            (
                cache_name(layer.index, layer.member) if layer.layer is None else str(layer.layer),
                layer.k.label,
                layer.v.label,
            )
            for layer in config.layers
        ),
        note=" ".join(config.notes),
    )
