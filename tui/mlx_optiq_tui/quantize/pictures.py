"""What the quantize screen draws of a model, a budget and a score, as text.

Pure functions; no widget. Colours help and never tell alone.
"""

from rich.text import Text

from mlx_optiq_ext.allocate.prediction import prediction_text
from mlx_optiq_ext.types.nbytes import format_nbytes
from mlx_optiq_ext.types.quant import Allocation, SensitivityTable
from mlx_optiq_tui.ansi import Style
from mlx_optiq_tui.curve import draw_curve
from mlx_optiq_tui.quantize.budget import Points, Uniform, budget_curve, compare
from mlx_optiq_tui.quantize.fit import Fit
from mlx_optiq_tui.quantize.model_facts import ModelFacts
from mlx_optiq_tui.quantize.wishes import Wishes
from mlx_optiq_tui.themes import Inks

__all__ = ["choice_text", "curve_text", "facts_line", "plan_line", "wishes_text"]

_CURVE_AROUND = 9
"""Lines of a curve besides the plot: title, axis, legend."""


def facts_line(facts: ModelFacts) -> str:
    """A model in one line."""
    parts = [facts.name, facts.architecture]
    parts += [f"{facts.numel:,} weights"] if facts.numel else []
    parts += [format_nbytes(facts.nbytes)] if facts.nbytes else []
    if facts.is_quantized:
        parts.append("quantized already: measure the original")
    return " · ".join(part for part in parts if part)


def plan_line(name: str, allocation: Allocation, table_file: str) -> str:
    """What would be written, in one line."""
    return (
        f"{name} at {allocation.achieved_bpw:.3f} bits per weight, "
        f"{format_nbytes(allocation.nbytes)}, by {table_file or 'a recorded measurement'}"
    )


def choice_text(table: SensitivityTable, allocation: Allocation, fit: Fit | None, inks: Inks) -> Text:
    """What a budget buys: size, prediction, and uniform choices beside it.

    Args:
        table: What was measured.
        allocation: What was chosen.
        fit: Of this machine, where the model is at hand.
        inks: Of the theme.
    """
    text = Text(overflow="ellipsis")
    text.append(f"{allocation.achieved_bpw:.3f}", "bold")
    text.append(f" bits per weight of at most {round(allocation.target_bpw, 3):g} · ")
    text.append(format_nbytes(allocation.nbytes), "bold")
    if fit is not None:
        text.append(f" · {_fit_words(fit)}", "" if fit.fits else inks.bad)
    if table.method == "static":
        return text.append("\nno prediction: the static method ranks tensors by shape")
    text.append("\npredicted KL ", "dim")
    text.append(prediction_text(allocation.predicted_divergence, table))
    near = compare(allocation)
    if near.within is not None:
        text.append("\nuniform within it ", "dim")
        text.append(_uniform(near.within))
        if near.ratio is not None:
            text.append(f" (×{near.ratio:.2f})", "bold")
    if near.above is not None:
        text.append("   next above " if near.within else "\nuniform above it ", "dim")
        text.append(_uniform(near.above))
    return text


def wishes_text(allocation: Allocation, wishes: Wishes, cursor: str) -> str:
    """What is wished besides the budget and what it costs, and what stands under the cursor.

    Args:
        allocation: With the prices of pins.
        wishes: Pins and protected edges.
        cursor: One line, or nothing.
    """
    said = ["edges protected"] if wishes.edges else []
    said += [f"{len(wishes.pins)} pinned"] if wishes.pins else []
    if said:
        # What floors cost is no wish.
        asked = (pin for pin in allocation.pins if pin.reason.startswith("--"))
        cost = sum(pin.cost_divergence for pin in asked)
        said.append(f"that costs KL {cost:.2g}" if cost > 0 else "that costs nothing")
    return "\n".join(line for line in (", ".join(said), cursor) if line)


def curve_text(
    table: SensitivityTable, allocation: Allocation, points: Points, width: int, height: int
) -> Text:
    """Bits against divergence, with the chosen budget on it.

    Args:
        table: What was measured.
        allocation: What was chosen.
        points: The line; empty while it is computed.
        width: Columns.
        height: Lines.
    """
    curve = budget_curve(table, allocation, points)
    if curve is None:
        return Text("nothing is predicted", "dim")
    style = Style(colors="truecolor", width=width)
    return Text.from_ansi(draw_curve(curve, style, max(height - _CURVE_AROUND, 6)))


def _uniform(row: Uniform) -> str:
    return f"{row.label} {row.bpw:.2f} bits, {row.divergence:.3g}"


def _fit_words(fit: Fit) -> str:
    if fit.fits:
        return "✓ fits" + (f", {fit.context_words} tokens of context" if fit.longest_context else "")
    return f"✗ needs {format_nbytes(fit.needed_nbytes)} of {format_nbytes(fit.memory_nbytes)}"
