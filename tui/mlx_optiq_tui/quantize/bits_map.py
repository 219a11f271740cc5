"""The heat map of bits with a cursor: choose a module, all of its kind or a block, and pin its width.

Draws and tells by messages what is wished; allocates nothing.
"""

from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from mlx_optiq_ext.types.report import HeatCell, HeatMap
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.heat_map import draw_bits_map, draw_sensitivity_map
from mlx_optiq_tui.quantize.newest import Newest

__all__ = ["BitsMap"]

_SCOPES = ("module", "kind", "block")
_SCOPE_WORDS = {"module": "this module", "kind": "this module of every block", "block": "this block"}


class BitsMap(Static, can_focus=True):
    """Blocks × modules, by chosen bits or by sensitivity; the cursor shows while it has the focus."""

    DEFAULT_CSS = "BitsMap { height: auto; width: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "go(-1, 0)", "Up", show=False),
        Binding("down,j", "go(1, 0)", "Down", show=False),
        Binding("left,h", "go(0, -1)", "Left", show=False),
        Binding("right,l", "go(0, 1)", "Right", show=False),
        Binding("space", "scope", "Module, kind or block"),
        Binding("plus,equals_sign", "step(1)", "Wider", key_display="+"),
        Binding("minus", "step(-1)", "Narrower", key_display="-"),
        Binding("delete,backspace", "free", "Free", key_display="del"),
    ]

    class Stepped(Message):
        """Pin paths to their next choice: wider (1), narrower (-1); or leave them to the budget again (0)."""

        def __init__(self, paths: tuple[str, ...], step: int) -> None:
            super().__init__()
            self.paths, self.step = paths, step

    class Moved(Message):
        """The cursor stands elsewhere."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self._heat: HeatMap | None = None
        self._cell: HeatCell | None = None
        self._scope = _SCOPES[0]
        self._by_bits = True
        self._width = 40
        self._drawing: Newest[Text] = Newest(self, self._drawn)

    def show(self, heat: HeatMap | None, width: int, *, by_bits: bool = True) -> None:
        """Draw a grid; the cursor stays where it is.

        Args:
            heat: Of what was chosen.
            width: Columns.
            by_bits: Else by sensitivity.
        """
        self._heat, self._width, self._by_bits = heat, width, by_bits
        path = self._cell.path if self._cell is not None else ""
        first = min(self._cells(), key=lambda cell: (cell.block is None, cell.row, cell.block), default=None)
        self._cell = next((cell for cell in self._cells() if cell.path == path), first)
        self._draw()

    @property
    def marked(self) -> tuple[str, ...]:
        """Paths under the cursor, as far as its scope reaches."""
        cell = self._cell
        if cell is None:
            return ()
        if self._scope == "module" or cell.block is None:
            return (cell.path,)
        if self._scope == "kind":
            return tuple(
                each.path for each in self._cells() if each.block is not None and each.row == cell.row
            )
        return tuple(each.path for each in self._cells() if each.block == cell.block)

    @property
    def cursor_words(self) -> str:
        """What stands under the cursor, and what keys do there."""
        cell = self._cell
        if cell is None or not self.has_focus or not self._by_bits:
            return ""
        parts = [cell.path, cell.choice + (" pinned" if cell.pinned else "")]
        parts += [f"KL {cell.divergence:.2g}"] if cell.divergence is not None else []
        scope = "" if cell.block is None else f"  (space: {_SCOPE_WORDS[self._scope]})"
        return " · ".join(parts) + scope

    def on_focus(self) -> None:
        """Show the cursor."""
        self._draw()
        self.post_message(self.Moved())

    def on_blur(self) -> None:
        """Hide it."""
        self._draw()
        self.post_message(self.Moved())

    def action_go(self, down: int, right: int) -> None:
        """Move the cursor to the next module in that direction."""
        if self._cell is None or self._heat is None:
            return
        columns, cell = self._heat.blocks, self._cell
        at = {(each.row, each.block): each for each in self._heat.cells}
        if cell.block is None:
            rows = list(self._heat.outside)
            place = rows.index(cell) + down
            if 0 <= place < len(rows):
                self._cell = rows[place]
            elif place < 0 and columns:
                row = len(self._heat.modules) - 1
                self._cell = next((at[row, block] for block in columns if (row, block) in at), cell)
        else:
            row, column = cell.row + down, columns.index(cell.block) + right
            while 0 <= row < len(self._heat.modules) and 0 <= column < len(columns):
                if (row, columns[column]) in at:
                    self._cell = at[row, columns[column]]
                    break
                row, column = row + down, column + right
            if row >= len(self._heat.modules) and self._heat.outside:
                self._cell = self._heat.outside[0]
        self._draw()
        self.post_message(self.Moved())

    def action_scope(self) -> None:
        """Reach further: a module, its kind in every block, a block; and again."""
        self._scope = _SCOPES[(_SCOPES.index(self._scope) + 1) % len(_SCOPES)]
        self._draw()
        self.post_message(self.Moved())

    def action_step(self, step: int) -> None:
        """Wish what is marked wider or narrower."""
        if self._by_bits and self.marked:
            self.post_message(self.Stepped(self.marked, step))

    def action_free(self) -> None:
        """Leave what is marked to the budget."""
        if self.marked:
            self.post_message(self.Stepped(self.marked, 0))

    def _cells(self) -> tuple[HeatCell, ...]:
        return (*self._heat.cells, *self._heat.outside) if self._heat is not None else ()

    def _draw(self) -> None:
        if self._heat is None:
            return
        heat, style = self._heat, Style(colors="truecolor", width=self._width)
        if self._by_bits:
            marked = frozenset(self.marked if self.has_focus else ())
            self._drawing.ask(lambda: Text.from_ansi(draw_bits_map(heat, style, marked)))
        else:
            self._drawing.ask(lambda: Text.from_ansi(draw_sensitivity_map(heat, style)))

    def _drawn(self, text: Text) -> None:
        self.update(text)
        line = next((n for n, each in enumerate(text.plain.splitlines()) if "]" in each), None)
        if line is not None:
            self.call_after_refresh(self.scroll_to_line, line)

    def scroll_to_line(self, line: int) -> None:
        """Keep a line of the picture in view."""
        if isinstance(self.parent, Widget):
            self.parent.scroll_to_region(Region(0, line, 1, 1), animate=False)
