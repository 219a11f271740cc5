"""Choose a budget: the slider, what it buys, the heat map and the curve; each move allocates anew.

Allocates in a thread, the newest wish only. Tells the screen what was chosen by a message.
"""

import asyncio

from msgspec.structs import replace
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from mlx_optiq_ext.errors import OptiqError
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_tui.lab_screen import EmptyState
from mlx_optiq_tui.quantize.budget import Points, budget_range, choose, curve_points
from mlx_optiq_tui.quantize.fit import fit_of, machine_memory_nbytes
from mlx_optiq_tui.quantize.model_facts import ModelFacts
from mlx_optiq_tui.quantize.pictures import choice_text, curve_text, map_text
from mlx_optiq_tui.quantize.slider import BudgetSlider

__all__ = ["BitsPane"]

_VIEWS = ("bits", "sensitivity", "curve")
_UNMEASURED = "Nothing is measured yet: pick a model and measure it, or open a sensitivity file (m)."


class BitsPane(Vertical):
    """The slider over its consequences; the screen says which pictures there is room for."""

    DEFAULT_CSS = """
    BitsPane { padding: 0 1; }
    BitsPane #choice { height: auto; margin-bottom: 1; }
    BitsPane #pictures { height: 1fr; }
    BitsPane #pictures > VerticalScroll { height: 1fr; }
    BitsPane.-unmeasured BudgetSlider, BitsPane.-unmeasured #choice, BitsPane.-unmeasured #pictures {
        display: none; }
    BitsPane #unmeasured { display: none; }
    BitsPane.-unmeasured #unmeasured { display: block; }
    """

    class Chosen(Message):
        """A budget was allocated."""

        def __init__(self, allocation: Allocation) -> None:
            super().__init__()
            self.allocation = allocation

    class _Curve(Message):
        def __init__(self, table: SensitivityTable, points: Points) -> None:
            super().__init__()
            self.table = table
            self.points = points

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, classes="-unmeasured -map")
        self.table: SensitivityTable | None = None
        self.allocation: Allocation | None = None
        self._facts: ModelFacts | None = None
        self._points: Points = ()
        self._cache_tokens = 1
        self._view = _VIEWS[0]

    def compose(self) -> ComposeResult:
        """Slider, words, pictures."""
        yield EmptyState(_UNMEASURED, id="unmeasured")
        yield BudgetSlider()
        yield Static(id="choice", markup=False)
        with Container(id="pictures"):
            with VerticalScroll(id="map-box"):
                yield Static(id="map", markup=False)
            with VerticalScroll(id="curve-box"):
                yield Static(id="curve", markup=False)

    def open(self, table: SensitivityTable, facts: ModelFacts | None, context: int) -> None:
        """Begin with a measurement.

        Args:
            table: What was measured.
            facts: Of the model, where it is at hand.
            context: Tokens that are to fit beside the weights.
        """
        self.table, self._points, self._cache_tokens = table, (), context
        self._facts = None if facts is None else replace(facts, numel=table.total_numel)
        self.remove_class("-unmeasured")
        slider = self.query_one(BudgetSlider)
        slider.ends = budget_range(table)
        slider.value = slider.ends.start
        self._allocate(table, slider.value)
        self._compute_curve(table)
        slider.focus()

    @on(BudgetSlider.Changed)
    def _moved(self, event: BudgetSlider.Changed) -> None:
        event.stop()
        if self.table is not None:
            self._allocate(self.table, event.value)

    @work(exclusive=True, group="allocate")
    async def _allocate(self, table: SensitivityTable, bpw: float) -> None:
        try:
            allocation = await asyncio.to_thread(choose, table, bpw)
        except OptiqError as error:
            self.query_one("#choice", Static).update(str(error))
            return
        self.post_message(self.Chosen(allocation))

    @work(exclusive=True, group="curve")
    async def _compute_curve(self, table: SensitivityTable) -> None:
        self.post_message(self._Curve(table, await asyncio.to_thread(curve_points, table)))

    def on_bits_pane_chosen(self, message: Chosen) -> None:
        """Draw what was chosen."""
        self.allocation = message.allocation
        self._draw()

    def on_bits_pane__curve(self, message: _Curve) -> None:
        """Draw the line, unless another table was opened meanwhile."""
        if message.table is self.table:
            self._points = message.points
            self._draw()

    def next_view(self) -> None:
        """Map by bits, map by sensitivity, curve, and again."""
        self._view = _VIEWS[(_VIEWS.index(self._view) + 1) % len(_VIEWS)]
        self.set_class(self._view == "curve", "-curve")
        self.set_class(self._view != "curve", "-map")
        self.call_after_refresh(self._draw)

    def on_resize(self) -> None:
        """Draw for the new width."""
        self.call_after_refresh(self._draw)

    def _draw(self) -> None:
        table, allocation = self.table, self.allocation
        if table is None or allocation is None:
            return
        fit = None
        if self._facts is not None and self._facts.config:
            bpw, memory = allocation.achieved_bpw, machine_memory_nbytes()
            fit = fit_of(self._facts, "chosen", bpw, memory_nbytes=memory, context=self._cache_tokens)
        self.query_one("#choice", Static).update(choice_text(table, allocation, fit))
        size = self.query_one("#map-box").content_size
        by_bits = self._view != "sensitivity"
        self.query_one("#map", Static).update(
            map_text(table, allocation, max(size.width - 2, 40), by_bits=by_bits)
        )
        size = self.query_one("#curve-box").content_size
        picture = curve_text(table, allocation, self._points, max(size.width - 2, 40), size.height)
        self.query_one("#curve", Static).update(picture)
