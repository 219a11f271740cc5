"""Values of a report: what the pictures show, before anybody draws them.

Made by ``quant.report``; drawn by the terminal, HTML and PNG faces and by the model card.
"""

import msgspec

__all__ = ["Curve", "CurvePoint", "HeatCell", "HeatMap", "Report", "TextTable"]


class TextTable(msgspec.Struct, frozen=True, kw_only=True):
    """A table ready to be shown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    highlight: int | None = None
    """Index of the row that the report is about."""
    note: str = ""

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, set to the left; numbers are set to the right."""
        cells = [row[column] for row in self.rows if row[column]]
        return column == 0 or not all(cell == "–" or cell.lstrip("+-<")[:1].isdigit() for cell in cells)


class HeatCell(msgspec.Struct, frozen=True, kw_only=True):
    """One module in the heat map."""

    path: str
    row: int
    """Index into :attr:`HeatMap.modules`; for modules outside of blocks, their order."""
    block: int | None = None
    numel: int = 0
    bits: int | None = None
    """Chosen nominal bits (16: left as it is); None where nothing was chosen yet."""
    choice: str = ""
    """Label of the choice: ``4g64``."""
    pinned: bool = False
    sensitivity: float | None = None
    """Divergence with only this unit stored as :attr:`HeatMap.probe`, nats per token."""
    divergence: float | None = None
    """Predicted divergence of the chosen storage alone, nats per token."""


class HeatMap(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks × modules, with the modules outside of blocks apart."""

    modules: tuple[str, ...]
    """Roles within a block, one per row: ``self_attn.q_proj``."""
    labels: tuple[str, ...]
    """Short names of the same."""
    blocks: tuple[int, ...]
    cells: tuple[HeatCell, ...]
    outside: tuple[HeatCell, ...] = ()
    probe: str = ""
    """Label of the choice that sensitivity refers to."""
    title: str = ""
    """What :attr:`HeatCell.sensitivity` stands for, where that is another number: ranks."""


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One point of bits against divergence."""

    label: str = ""
    bpw: float
    divergence: float
    half_width: float = 0.0
    """Half of the 95 % interval of ``divergence``."""


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Bits against divergence: predicted on calibration text, measured on held-out text."""

    predicted: tuple[CurvePoint, ...] = ()
    """Best allocation at each budget, ascending in bpw."""
    chosen: CurvePoint | None = None
    """The allocation of this report, as predicted."""
    uniform: tuple[CurvePoint, ...] = ()
    """Every unit stored alike, as predicted; choices that were measured are left out."""
    measured: tuple[CurvePoint, ...] = ()
    """Candidates of the score record; this model first."""
    measured_uniform: tuple[CurvePoint, ...] = ()
    """Uniform rows of the score record: plain rounding, as stock mlx-lm writes it."""
    predicted_as: str = "predicted"
    """What the predictions assume, for legends: ``predicted with full rounding``."""
    note: str = ""
    """How far to trust the predictions."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one report shows; absent parts are None and named in ``missing``."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    """Name and value, in order of importance."""
    comparison: TextTable | None = None
    domains: TextTable | None = None
    bits: TextTable | None = None
    pins: TextTable | None = None
    curve: Curve | None = None
    heat_map: HeatMap | None = None
    missing: tuple[str, ...] = ()
    """Parts that could not be shown, with what would make them."""
    notes: tuple[str, ...] = ()
