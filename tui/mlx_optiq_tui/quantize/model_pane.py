"""Pick what to quantize: a model from the Hub, the cache or a folder, or a sensitivity file; and what fits.

Reads headers and asks the Hub in threads. Tells what was picked by messages; the screen starts the work.
"""

import asyncio
from pathlib import Path

from msgspec.structs import replace
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Button, DataTable, Input, Label, Static

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.formats.sensitivity import read_sensitivity
from mlx_optiq_ext.hub.search import FoundModel, cached_models, search_models
from mlx_optiq_ext.types.options import MeasureOptions
from mlx_optiq_ext.types.quant import SensitivityTable
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.quantize.fit import fit_table, machine_memory_nbytes
from mlx_optiq_tui.quantize.model_facts import ModelFacts, facts_of_folder, facts_of_found
from mlx_optiq_tui.quantize.pictures import facts_line
from mlx_optiq_tui.table import draw_table
from mlx_optiq_tui.widgets.option_form import OptionForm

__all__ = ["ModelPane"]

_MEASURED = (
    *("method", "correction", "candidate_bits", "candidate_groups", "reference"),
    *("num_tokens", "window", "probes"),
)
_CONTEXT = 8192
_MOST_BITS = 33
_TO_MEASURE = "Measure it (e): minutes for a small model, hours for a large one. Stopped, it goes on."
_QUANTIZED = "It is quantized already: pick the original weights."


class ModelPane(VerticalScroll):
    """What is there, what fits, and how it is measured."""

    DEFAULT_CSS = """
    ModelPane { padding: 0 1; }
    ModelPane #found { height: auto; max-height: 9; display: none; }
    ModelPane.-found #found { display: block; }
    ModelPane #facts { height: auto; }
    ModelPane .chosen { display: none; height: auto; }
    ModelPane.-chosen .chosen { display: block; }
    ModelPane #table-row, ModelPane #fit-row, ModelPane #source-row { height: 1; }
    ModelPane Label { width: 20; color: $text-muted; }
    ModelPane #source, ModelPane #table { width: 1fr; }
    ModelPane #cache-bits-label { width: auto; margin-right: 1; }
    ModelPane #context { width: 9; }
    ModelPane #cache-bits { width: 7; }
    ModelPane #measure { margin-left: 2; }
    """

    class Chosen(Message):
        """A model was picked."""

        def __init__(self, facts: ModelFacts) -> None:
            super().__init__()
            self.facts = facts

    class Opened(Message):
        """A sensitivity file was opened."""

        def __init__(self, file: str, table: SensitivityTable) -> None:
            super().__init__()
            self.file = file
            self.table = table

    class Refitted(Message):
        """Another KV cache is to fit beside the weights."""

    class Measure(Message):
        """The model is to be measured."""

    class _Listed(Message):
        def __init__(self, found: tuple[FoundModel, ...], said: str) -> None:
            super().__init__()
            self.found = found
            self.said = said

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.facts: ModelFacts | None = None
        self._found: tuple[FoundModel, ...] = ()

    def compose(self) -> ComposeResult:
        """The question above, the answers below."""
        with Horizontal(id="source-row"):
            yield Label("Model")
            yield Input(
                placeholder="words to search the Hub, a folder, or a sensitivity file",
                id="source",
                compact=True,
            )
        yield Static("Enter searches; nothing typed lists the models in the cache.", id="said", markup=False)
        yield DataTable(id="found", cursor_type="row")
        yield Static(id="facts", classes="chosen", markup=False)
        with Horizontal(id="table-row", classes="chosen"):
            yield Label("Sensitivity file")
            yield Input(id="table", compact=True)
        with Horizontal(id="fit-row", classes="chosen"):
            yield Label("Context")
            yield Input(str(_CONTEXT), id="context", type="integer", compact=True)
            yield Label("  KV bits", id="cache-bits-label")
            yield Input(id="cache-bits", placeholder="full", type="number", compact=True)
            yield Button("Measure (e)", id="measure", variant="primary", compact=True)
        yield OptionForm((MeasureOptions, _MEASURED), id="measure-options")

    def on_mount(self) -> None:
        """Columns of what is found."""
        self.query_one(DataTable).add_columns("model", "weights", "downloads", "")
        self.query_one(OptionForm).add_class("chosen")

    @property
    def table_file(self) -> str:
        """Where the measurement goes."""
        return self.query_one("#table", Input).value.strip()

    @property
    def context(self) -> int:
        """Tokens that are to fit beside the weights."""
        text = self.query_one("#context", Input).value
        return int(text) if text.isdigit() and int(text) else _CONTEXT

    @property
    def cache_bits(self) -> float:
        """Stored bits per cached number; 0: as wide as the model's floats."""
        try:
            bits = float(self.query_one("#cache-bits", Input).value or 0)
        except ValueError:
            return 0.0
        return bits if 1 <= bits <= _MOST_BITS else 0.0

    def set_cache_bits(self, bits: float) -> None:
        """Reckon with a KV cache that was chosen."""
        self.query_one("#cache-bits", Input).value = f"{bits:.3g}"

    @property
    def flags(self) -> tuple[str, ...]:
        """Options of the measurement.

        Raises:
            UsageError: One is out of bounds.
        """
        return self.query_one(OptionForm).flags()

    @on(Input.Submitted, "#source")
    def _search(self, event: Input.Submitted) -> None:
        event.stop()
        self.say("looking …")
        self._look(event.value.strip())

    @on(Input.Changed, "#context")
    @on(Input.Changed, "#cache-bits")
    def _cache_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self.facts is not None:
            self.facts = replace(self.facts, cache_bits=self.cache_bits)
            self._draw_facts()
            self.post_message(self.Refitted())

    @on(DataTable.RowSelected, "#found")
    def _pick(self, event: DataTable.RowSelected) -> None:
        event.stop()
        self.say(f"asking for {self._found[event.cursor_row].repo_id} …")
        self._take(self._found[event.cursor_row])

    @on(Button.Pressed, "#measure")
    def _measure(self, event: Button.Pressed) -> None:
        event.stop()
        self.post_message(self.Measure())

    @work(exclusive=True)
    async def _look(self, words: str) -> None:
        path = Path(words).expanduser()
        try:
            if words and (path.exists() or words.startswith((".", "/", "~"))):
                await self._open(path)
                return
            self.post_message(await asyncio.to_thread(_listing, words))
        except (OptiqError, OSError) as error:
            self.say(str(error))

    @work(exclusive=True)
    async def _take(self, found: FoundModel) -> None:
        try:
            self.post_message(self.Chosen(await asyncio.to_thread(facts_of_found, found)))
        except (OptiqError, OSError) as error:
            self.say(str(error))

    async def _open(self, path: Path) -> None:
        """A file is a sensitivity file, and so is a folder that has one and no weights to measure."""
        if path.is_file():
            table = await asyncio.to_thread(read_sensitivity, path)
            self.post_message(self.Opened(str(path), table))
            return
        facts = await asyncio.to_thread(facts_of_folder, path)
        if facts.is_quantized:
            table = await asyncio.to_thread(read_sensitivity, path)
            self.post_message(self.Opened(str(path), table))
        else:
            self.post_message(self.Chosen(facts))

    def on_model_pane__listed(self, message: _Listed) -> None:
        """Show what was found."""
        self._found = message.found
        self.set_class(bool(message.found), "-found")
        self.say(message.said)
        table = self.query_one(DataTable)
        table.clear()
        for model in message.found:
            weights = f"{model.numel / 1e9:.2f} B" if model.numel else ""
            about = (
                "in the cache" if model.is_cached else "access must be asked for" if model.is_gated else ""
            )
            table.add_row(model.repo_id, weights, f"{model.downloads:,}" if model.downloads else "", about)
        if message.found:
            table.focus()

    def show_chosen(self, facts: ModelFacts | None, table_file: str) -> None:
        """Draw what was picked.

        Args:
            facts: The model; None where only its measurement is at hand.
            table_file: Where its measurement is, or goes.
        """
        self.facts = None if facts is None else replace(facts, cache_bits=self.cache_bits)
        self.set_class(facts is not None, "-chosen")
        self.query_one("#table", Input).value = table_file
        self.say(
            f"opened {table_file}" if facts is None else _QUANTIZED if facts.is_quantized else _TO_MEASURE
        )
        self._draw_facts()

    def say(self, text: str) -> None:
        """One line below the question."""
        self.query_one("#said", Static).update(text)

    def on_resize(self) -> None:
        """Draw for the new width."""
        self._draw_facts()

    def _draw_facts(self) -> None:
        facts = self.facts
        if facts is None:
            return
        fits = fit_table(facts, memory_nbytes=machine_memory_nbytes(), context=self.context)
        lines = [facts_line(facts)]
        width = max(self.content_size.width, 60)
        lines += (
            [draw_table(fits, Style(width=width))] if fits else ["Its number of weights is not known yet."]
        )
        self.query_one("#facts", Static).update("\n".join(lines))


def _listing(words: str) -> ModelPane._Listed:
    """Models for words; where the Hub does not answer, those of the cache, and that it was so."""
    cached = tuple(model for model in cached_models() if words.lower() in model.repo_id.lower())
    if not words:
        said = f"{len(cached)} models in the cache" if cached else "no model is in the cache"
        return ModelPane._Listed(cached, said)
    try:
        found = search_models(words)
    except OptiqError as error:
        return ModelPane._Listed(cached, str(error))
    names = {model.repo_id for model in found}
    found = (*(model for model in cached if model.repo_id not in names), *found)
    return ModelPane._Listed(found, f"{len(found)} models; Enter picks one" if found else "nothing found")
