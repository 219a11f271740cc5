"""Choose a budget: the slider, what it buys, the heat map and the curve; each move allocates anew.

Computes in threads, the newest wish only. Tells the screen what was chosen by a message.
"""

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Container, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from mlx_optiq_ext.allocate.bitmap import allocate
from mlx_optiq_ext.allocate.heat_map import build_heat_map
from mlx_optiq_ext.allocate.menu import Menu, build_menus
from mlx_optiq_ext.errors import BudgetInfeasible, OptiqError
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.options import AllocateOptions
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_ext.types.report import HeatMap
from mlx_optiq_tui.lab import lab_of
from mlx_optiq_tui.lab_screen import EmptyState
from mlx_optiq_tui.quantize.bits_map import BitsMap
from mlx_optiq_tui.quantize.budget import BudgetRange, Points, budget_range, curve_points
from mlx_optiq_tui.quantize.fit import fit_of, machine_memory_nbytes
from mlx_optiq_tui.quantize.model_facts import ModelFacts
from mlx_optiq_tui.quantize.newest import Newest
from mlx_optiq_tui.quantize.pictures import choice_text, curve_text, wishes_text
from mlx_optiq_tui.quantize.slider import BudgetSlider
from mlx_optiq_tui.quantize.target_form import TargetForm
from mlx_optiq_tui.quantize.wishes import Wishes, bpw_of

__all__ = ["BitsPane"]

_VIEWS = ("bits", "sensitivity", "curve")
_UNMEASURED = "Nothing is measured yet: pick a model and measure it, or open a sensitivity file (m)."


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a budget and wishes come to."""

    table: SensitivityTable
    options: AllocateOptions
    allocation: Allocation | None = None
    heat: HeatMap | None = None
    refusal: str = ""


class _CurveAnswer(msgspec.Struct, frozen=True, kw_only=True):
    table: SensitivityTable
    points: Points


class BitsPane(Vertical):
    """The slider over its consequences; the screen says which pictures there is room for."""

    DEFAULT_CSS = """
    BitsPane { padding: 0 1; }
    BitsPane #choice { height: auto; }
    BitsPane #wishes { height: auto; margin-bottom: 1; }
    BitsPane #pictures { height: 1fr; }
    BitsPane #pictures > VerticalScroll { height: 1fr; }
    BitsPane.-unmeasured BudgetSlider, BitsPane.-unmeasured #choice, BitsPane.-unmeasured #wishes,
    BitsPane.-unmeasured #pictures { display: none; }
    BitsPane #unmeasured { display: none; }
    BitsPane.-unmeasured #unmeasured { display: block; }
    """

    class Chosen(Message):
        """A budget was allocated; None where it cannot be."""

        def __init__(self, allocation: Allocation | None, options: AllocateOptions) -> None:
            super().__init__()
            self.allocation, self.options = allocation, options

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, classes="-unmeasured -map")
        self.table: SensitivityTable | None = None
        self.allocation: Allocation | None = None
        self._facts: ModelFacts | None = None
        self.wishes = Wishes()
        self._menus: Sequence[Menu] = ()
        self._heat: HeatMap | None = None
        self._points: Points = ()
        self._cache_tokens = 1
        self._view = _VIEWS[0]
        self._allocating: Newest[_Answer] = Newest(self, self._allocated)
        self._curve: Newest[_CurveAnswer] = Newest(self, self._curve_computed)

    def compose(self) -> ComposeResult:
        """Slider, words, pictures."""
        yield EmptyState(_UNMEASURED, id="unmeasured")
        yield BudgetSlider()
        yield Static(id="choice", markup=False)
        yield Static(id="wishes", markup=False)
        with Container(id="pictures"):
            with VerticalScroll(id="map-box"):
                yield BitsMap(id="map")
            with VerticalScroll(id="curve-box"):
                yield Static(id="curve", markup=False)

    def open(self, table: SensitivityTable, facts: ModelFacts | None, context: int) -> None:
        """Begin with a measurement.

        Args:
            table: What was measured.
            facts: Of the model, where it is at hand.
            context: Tokens that are to fit beside the weights.
        """
        self._begin(table, facts, context)

    def clear(self) -> None:
        """Another model was picked, of which nothing is measured yet."""
        self.table = self.allocation = self._heat = None
        self.add_class("-unmeasured")

    @work(exclusive=True)
    async def _begin(self, table: SensitivityTable, facts: ModelFacts | None, context: int) -> None:
        menus, ends = await asyncio.to_thread(_menus_and_ends, table)
        self.table, self._points, self._cache_tokens = table, (), context
        self._menus, self._heat, self.allocation = menus, None, None
        self._facts = None if facts is None else replace(facts, numel=table.total_numel)
        self.remove_class("-unmeasured")
        slider = self.query_one(BudgetSlider)
        slider.ends, slider.value = ends, ends.start
        self._wish(Wishes())
        slider.focus()

    def refit(self, facts: ModelFacts, context: int) -> None:
        """Reckon with another KV cache.

        Args:
            facts: Of the model.
            context: Tokens that are to fit beside the weights.
        """
        if self.table is not None and self._facts is not None:
            self._facts = replace(facts, numel=self.table.total_numel)
            self._cache_tokens = context
            self._draw()

    @property
    def is_allocating(self) -> bool:
        """Whether what is shown is not yet of the slider's budget."""
        return self._allocating.is_busy

    @on(BudgetSlider.Changed)
    def _moved(self, event: BudgetSlider.Changed) -> None:
        event.stop()
        self._allocate(event.value)

    @on(BitsMap.Stepped)
    def _stepped(self, event: BitsMap.Stepped) -> None:
        event.stop()
        if self.table is None or self.allocation is None:
            return
        if event.step:
            self._wish(self.wishes.stepped(self._menus, self.allocation, event.paths, event.step))
        else:
            self._wish(self.wishes.freed(self.table, event.paths))

    @on(BitsMap.Moved)
    def _looked(self, event: BitsMap.Moved) -> None:
        event.stop()
        self._draw_wishes()

    def ask_target(self) -> None:
        """Ask for a size or a memory, and move the slider to what it pays."""
        table, facts, context = self.table, self._facts, self._cache_tokens
        if table is None:
            return
        ends = self.query_one(BudgetSlider).ends

        def budget_of(size: str, memory: str) -> float:
            bpw = bpw_of(table, facts, size=size, memory=memory, context=context)
            if bpw < ends.low:
                least = format_nbytes(int(ends.low * table.total_numel / 8))
                raise BudgetInfeasible(
                    f"that pays {bpw:.2f} bits per weight; the least is {ends.low:.2f}, {least} of weights"
                )
            return min(bpw, ends.high)

        self.app.push_screen(TargetForm(budget_of, context), self._use_target)

    def _use_target(self, bpw: float | None) -> None:
        if bpw is not None:
            self.query_one(BudgetSlider).value = bpw
            self._allocate(bpw)

    def toggle_edges(self) -> None:
        """Protect embedding, head, first and last block, or no longer."""
        if self.table is not None:
            self._wish(replace(self.wishes, edges=not self.wishes.edges))

    def _wish(self, wishes: Wishes) -> None:
        """Allocate with other wishes; the curve changes too."""
        self.wishes = wishes
        self._allocate(self.query_one(BudgetSlider).value)
        self._compute_curve()

    def _allocate(self, bpw: float) -> None:
        table, wishes = self.table, self.wishes
        if table is not None:
            self._allocating.ask(lambda: _answer(table, wishes, bpw))

    def _compute_curve(self) -> None:
        table, wishes, bpw = self.table, self.wishes, self.query_one(BudgetSlider).value
        if table is not None:
            wanted = self._curve.is_wanted
            self._curve.ask(
                lambda: _CurveAnswer(
                    table=table, points=curve_points(table, wishes.options(table, bpw), wanted)
                )
            )

    def _allocated(self, answer: _Answer) -> None:
        """Draw what was chosen; what was chosen before stays drawn where nothing can be."""
        if answer.table is not self.table:
            return
        self.post_message(self.Chosen(answer.allocation, answer.options))
        if answer.allocation is None:
            self.query_one("#choice", Static).update(f"✕ {answer.refusal}")
        else:
            self.allocation, self._heat = answer.allocation, answer.heat
            self._draw()
        self._draw_wishes()

    def _curve_computed(self, answer: _CurveAnswer) -> None:
        if answer.table is self.table:
            self._points = answer.points
            self._draw()

    def next_view(self) -> None:
        """Map by bits, map by sensitivity, curve, and again."""
        self._view = _VIEWS[(_VIEWS.index(self._view) + 1) % len(_VIEWS)]
        self.set_class(self._view == "curve", "-curve")
        self.set_class(self._view != "curve", "-map")
        self.call_after_refresh(self._draw)

    def show_bits(self) -> None:
        """Go into the map of bits."""
        if self._view != _VIEWS[0]:
            self._view = _VIEWS[-1]
            self.next_view()
        self.call_after_refresh(self.query_one(BitsMap).focus)

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
        inks = lab_of(self).inks
        self.query_one("#choice", Static).update(choice_text(table, allocation, fit, inks))
        size = self.query_one("#map-box").content_size
        by_bits = self._view != "sensitivity"
        self.query_one(BitsMap).show(self._heat, max(size.width - 2, 40), by_bits=by_bits)
        size = self.query_one("#curve-box").content_size
        picture = curve_text(table, allocation, self._points, max(size.width - 2, 40), size.height)
        self.query_one("#curve", Static).update(picture)

    def _draw_wishes(self) -> None:
        if self.allocation is not None:
            words = wishes_text(self.allocation, self.wishes, self.query_one(BitsMap).cursor_words)
            self.query_one("#wishes", Static).update(words)
            self.query_one("#wishes").display = bool(words)


def _menus_and_ends(table: SensitivityTable) -> tuple[tuple[Menu, ...], BudgetRange]:
    menus = tuple(build_menus(table))
    return menus, budget_range(table, menus)


def _answer(table: SensitivityTable, wishes: Wishes, bpw: float) -> _Answer:
    options = wishes.options(table, bpw)
    try:
        allocation = allocate(table, options)
    except OptiqError as error:
        return _Answer(table=table, options=options, refusal=str(error))
    heat = build_heat_map(table, allocation)
    return _Answer(table=table, options=options, allocation=allocation, heat=heat)
